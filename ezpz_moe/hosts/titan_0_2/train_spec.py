"""Define the ``TrainSpec`` named ``ezpz_moe``, with every flavor as one of its models.

The host looks up all its functions in one spec, but flavors are built from several of its models.
Each function below therefore asks the host's own spec for the current flavor. The host builds the
tokenizer first, with the settings that the run trains with. They are completed and checked there,
and rank 0 locks the run's folder.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.components.validate import BaseValidator
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec, register_train_spec
from torchtitan.tools.logging import logger

from ezpz_moe.config.job import MODEL_NAME, Job
from ezpz_moe.errors import EzpzError, exit_on_user_error
from ezpz_moe.hosts import run_folder
from ezpz_moe.hosts.cpu import sum_reduction_on_gloo
from ezpz_moe.hosts.documents import check_shares
from ezpz_moe.hosts.precision import PARAM, agreeing_on_precision
from ezpz_moe.hosts.ranks import is_dry_run
from ezpz_moe.hosts.titan_0_2 import metrics
from ezpz_moe.hosts.titan_0_2.command import has_flags
from ezpz_moe.hosts.titan_0_2.conflicts import refuse_conflicts
from ezpz_moe.hosts.titan_0_2.data import check_validation_shares
from ezpz_moe.hosts.titan_0_2.models import FlavorArgs, build_model
from ezpz_moe.hosts.titan_0_2.validation import UncountedValidator

Complete = Callable[[Any, Job], None]


def register_flavors(job: Job, *, complete: Complete) -> None:
    """Make the flavors that the job can name the models of ``[model] name = "ezpz_moe"``.

    Args:
        job: where flavors and files are looked up.
        complete: fills what the job leaves open in the host's config.
    """
    # Always made anew: the functions in it are bound to this job's folder.
    spec = _train_spec(job, complete)
    try:
        registered = get_train_spec(MODEL_NAME)
    except ValueError:
        register_train_spec(MODEL_NAME, spec)
    else:  # from an earlier job in this process; the host refuses to register a name twice
        for field in dataclasses.fields(spec):
            setattr(registered, field.name, getattr(spec, field.name))


def _train_spec(job: Job, complete: Complete) -> TrainSpec:
    flavors = FlavorArgs(job.folder, str(job.path or ""))
    return TrainSpec(
        # The host calls all of these without catching our errors, and would show a traceback.
        model_cls=exit_on_user_error()(build_model),
        model_args=flavors,
        parallelize_fn=_parallelize,
        pipelining_fn=_pipeline,
        build_optimizers_fn=_build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=_build_dataloader,
        build_tokenizer_fn=partial(_build_tokenizer, job=job, flavors=flavors, complete=complete),
        build_loss_fn=build_cross_entropy_loss,
        build_validator_fn=_build_validator,
        build_metrics_processor_fn=metrics.build,
        state_dict_adapter=_state_dict_adapter,
    )


@exit_on_user_error()
def _build_tokenizer(config: Any, *, job: Job, flavors: FlavorArgs, complete: Complete) -> Any:
    complete(config, job)
    # The flavor of the flags, which need not be the one of the file.
    flags = " and the command line" if has_flags(sys.argv[1:], job) else ""
    refuse_conflicts(config, flavors[config.model.flavor], f"{job.source}{flags}")
    # Before anything else is built, so that a run that is refused has written nothing.
    run_folder.hold_for(config, config.job.dump_folder)
    if run_folder.saves_checkpoints(config) and not is_dry_run(config):
        # The checkpoint manager is not in the spec, and the host has no other door to it.
        logger.info(
            "ezpz_moe: SIGTERM ends this run without saving the step that it is at; with "
            "torchtitan 0.3 it is saved"
        )
    return build_hf_tokenizer(config)


@exit_on_user_error()
def _build_dataloader(*, dp_world_size: int, job_config: Any, **more: Any) -> Any:
    training = job_config.training
    # Only here is the number of data-parallel ranks known.
    check_shares(training.dataset, training.dataset_path, dp_world_size)
    return build_text_dataloader(dp_world_size=dp_world_size, job_config=job_config, **more)


@exit_on_user_error()
def _build_validator(
    *, job_config: Any, dp_world_size: int, tokenizer: Any, **more: Any
) -> BaseValidator:
    check_validation_shares(job_config, dp_world_size, tokenizer)
    return UncountedValidator(
        job_config=job_config, dp_world_size=dp_world_size, tokenizer=tokenizer, **more
    )


@exit_on_user_error()
def _pipeline(model: Any, *args: Any) -> Any:
    pipelining_fn = _of(model).pipelining_fn
    if pipelining_fn is None:
        raise EzpzError(
            f"parallelism.pipeline_parallel_degree: torchtitan 0.2 has no pipeline for "
            f"{model.host_model}. Set it to 1."
        )
    return pipelining_fn(model, *args)


def _precision_of(model: Any, parallel_dims: Any, job_config: Any) -> str:
    param = job_config.training.mixed_precision_param
    return f'{PARAM} = "{param}" and experts in {model.computed_in}'


# The precision check is outermost, so it runs before FSDP would gather shards of unequal dtypes.
@partial(agreeing_on_precision, precision_of=_precision_of)
@sum_reduction_on_gloo
def _parallelize(model: Any, *args: Any, **kwargs: Any) -> nn.Module:
    return _of(model).parallelize_fn(model, *args, **kwargs)


def _build_optimizers(model_parts: list[Any], *args: Any, **kwargs: Any) -> Any:
    return _of(model_parts[0]).build_optimizers_fn(model_parts, *args, **kwargs)


def _state_dict_adapter(model_args: Any, hf_assets_path: str | None) -> Any:
    adapter = _of(model_args).state_dict_adapter
    return adapter and adapter(model_args, hf_assets_path)


def _of(model: Any) -> TrainSpec:
    """Return the host's spec for a model or its arguments."""
    return get_train_spec(model.host_model)
