"""Turn a job into torchtitan 0.3's ``Trainer.Config``.

If the job does not set a field, it keeps the host's own default, with these exceptions:

- ``training.disable_cuda_graphs`` is true, as in 0.2 and as in the host's own large MoE configs;
- the tokenizer and the training text are the embedded ones, which need no download;
- validation reads the training text, if that is the embedded one or a file of the user's;
- on the CPU ``parallelism.spmd_backend`` is ``"partial_dtensor"`` where gloo needs it;
- on a CPU that emulates bfloat16, ``training.mixed_precision_param`` is ``"float32"``;
- ``metrics.log_freq`` is a divisor of ``[telemetry] every``, if it is set;
- ``checkpoint.last_save_model_only`` is false, except for safetensors and a seed checkpoint.

The host's bare config has no usable default for the optimizer and the loss. They are those of its
own MoE configs: AdamW for all parameters, and cross-entropy in chunks of the sequence.
"""

# No `from __future__ import annotations`: the host's command line reads the fields of JobConfig.

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import Configurable
from torchtitan.config.configs import TrainingConfig
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    FullAC,
    MemoryBudgetAC,
)
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.job import Job, flavor_of
from ezpz_moe.config.train_only import train_only_of
from ezpz_moe.errors import EzpzError, exit_on_user_error
from ezpz_moe.hosts import run_folder
from ezpz_moe.hosts.cpu import sum_reduction_on_gloo
from ezpz_moe.hosts.documents import VALIDATES_ON_TRAINING_TEXT, is_ours
from ezpz_moe.hosts.titan import gloo, overlap_conflicts, precision, router_remarks
from ezpz_moe.hosts.titan.activation_checkpointing import (
    SelectiveACKeepingProducts,
    keeping_products,
    products_kept,
)
from ezpz_moe.hosts.titan.announcing import announcing
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.checkpointer import Checkpointer
from ezpz_moe.hosts.titan.conflicts import is_about_to_train, refuse_conflicts
from ezpz_moe.hosts.titan.initial_values import starting_as_one_rank
from ezpz_moe.hosts.titan.models import (
    model_spec,
    what_changes_nothing,
    what_differs,
    what_it_equals,
)
from ezpz_moe.hosts.titan.reporting import metrics, reporting_drops
from ezpz_moe.hosts.titan.validation import WholeTextValidator

_ACTIVATION_CHECKPOINTING: dict[str, type[ActivationCheckpointing.Config] | None] = {
    "none": None,
    "selective": SelectiveACKeepingProducts.Config,
    "full": FullAC.Config,
    "memory_budget": MemoryBudgetAC.Config,
}


@dataclass(kw_only=True, slots=True)
class JobConfig(Trainer.Config):
    """The config of a job: the stock trainer's, plus checks. ``build()`` builds the stock trainer.

    ``trainer_config`` constructs a job from its file and then sets ``handed_over``, which every
    copy inherits. The host copies it twice: with the flags of its command line, and in ``build()``.
    Where flags come, only copies are checked, because a flag may still correct the file. That is
    so in a process that is about to train; elsewhere (``show``, ``doctor``) the first construction
    is checked, unless flags were given.
    """

    origin: Annotated[str, tyro.conf.Suppress] = ""
    """Where the settings come from, for messages."""

    is_precision_ours: Annotated[bool, tyro.conf.Suppress] = False
    """Whether the job leaves ``training.mixed_precision_param`` to this CPU."""

    handed_over: Annotated[bool, tyro.conf.Suppress] = False
    """False in the first construction, true in the host's copies. A mistake in a copy ends the
    process, because the host would show a traceback."""

    written: Annotated[int, tyro.conf.Suppress] = 0
    """A digest of what the job says, in the host's copies: with flags, they differ from it."""

    awaits_flags: Annotated[bool, tyro.conf.Suppress] = False
    """True in the first construction if flags may still change it: it is not checked."""

    training_text: Annotated[Any, tyro.conf.Suppress] = None
    """The dataloader that validation has, because the job names no text for it."""

    learners: Annotated[Any, tyro.conf.Suppress] = None
    """What learns, if not everything does."""

    # Not in `build()`: the host calls that after it has opened its trace log in the dump folder.
    # The host's own checks are in the constructor, too.
    def __post_init__(self) -> None:
        if self.awaits_flags:
            return
        has_flags = self.handed_over and _digest(self) != self.written
        where = f"{self.origin} and the command line" if has_flags else self.origin
        # Before the checks, which look at the model as it will be trained.
        titan().fit_model(self)
        precision.settle(self)
        with exit_on_user_error() if self.handed_over else contextlib.nullcontext():
            refuse_conflicts(self, where)
            with _refusals(where):
                # Called by name: `super()` without arguments does not work in a dataclass with
                # slots, which is a new class.
                Trainer.Config.__post_init__(self)
        if is_about_to_train():
            if self.is_precision_ours:
                precision.log_once(self)
            router_remarks.log_once(self)

    def build(self, **parts: Any) -> Any:
        """Build the trainer, in a folder where no other run writes."""
        with exit_on_user_error():
            run_folder.hold_for(self, self.dump_folder)
        if hasattr(self.metrics, "warmup_steps"):
            self.metrics.warmup_steps = self.lr_scheduler.warmup_steps
            self.metrics.model = self.model_spec.flavor
            self.metrics.job = self.origin
        # A flag may have named another text.
        if self.validator.enable and self.validator.dataloader == self.training_text:
            logger.warning(VALIDATES_ON_TRAINING_TEXT)
        return Trainer.Config.build(self, **parts)


def trainer_config(job: Job, host_flags: Sequence[str] = ()) -> JobConfig:
    """Return the trainer's config for a job, after the trainer's own flags.

    Raises:
        EzpzError: the flavor, the data or a combination of settings is wrong; the message names
            the job.
    """
    flavor = reporting_drops(flavor_of(job))
    spec = model_spec(
        flavor,
        why=f"asked for by flavor {flavor.name} in {job.path or flavor.source}",
        **_arguments(job, moe_comm_backend="parallelism.expert_parallel_comm_backend"),
    )
    learners = _train_only(spec, job, flavor)
    notes = (what_differs(flavor, spec), what_changes_nothing(flavor), what_it_equals(flavor))
    for line in filter(None, (*notes, overlap_conflicts.what_it_overlaps(flavor))):
        logger.info(f"ezpz_moe: {line}")
    # Now, and not in `model_spec`: analysis and describe build models too, and need no wrappers.
    spec.model = starting_as_one_rank(spec.model)
    spec.parallelize_fn = products_kept(sum_reduction_on_gloo(spec.parallelize_fn))
    announcing(spec, flavor)
    # Wrapped last, so it runs first: before FSDP would gather shards of unequal dtypes.
    precision.agreeing(spec, flavor)
    # Not JobConfig(), which would already check itself.
    sections = _fields(Trainer.Config()) | _sections(job, flavor, spec)
    sections["activation_checkpoint"] = keeping_products(sections["activation_checkpoint"])
    sections["metrics"] = metrics(flavor, sections["metrics"])
    _refuse_options_of_another_mode(job, sections["activation_checkpoint"])
    # The job's own values come last in the merge, so they win over what suits this CPU.
    ours = _cpu_values(job) | (in_float32 := precision.values(job))
    for name, change in _nested(ours | _field_values(job)).items():
        with _refusals(f"{job.source}: {name}"):
            sections[name] = _changed(sections[name], change)
    config = JobConfig(
        **sections,
        origin=job.source,
        is_precision_ours=bool(in_float32),
        learners=learners,
        awaits_flags=is_about_to_train() or bool(host_flags),
    )
    config.awaits_flags = False
    if host_flags:
        config = _told(config, host_flags)
    # Not in the constructor call: the host's copies must see true, this construction false.
    config.handed_over, config.written = True, _digest(config)
    return config


def _digest(config: JobConfig) -> int:
    """Return a number that the trainer's settings have in this process, and no others."""
    # The host passes no flags on, and what it copies is equal without them.
    return hash(repr([getattr(config, each.name) for each in dataclasses.fields(Trainer.Config)]))


def _told(config: JobConfig, host_flags: Sequence[str]) -> JobConfig:
    """Return the config as the trainer's command line would change it, and check that.

    Raises:
        EzpzError: the flags and the job exclude each other.
    """
    with titan().importing():  # a run needs nothing of this
        from ezpz_moe.hosts.told import changed_by
    origin = config.origin
    config.origin = f"{origin} and the command line"
    told = changed_by(config, host_flags)
    told.origin = origin
    return told


def _train_only(spec: ModelSpec, job: Job, flavor: Flavor) -> Any:
    """Freeze what the job's ``[train_only]`` does not name, in place; return what learns."""
    said = train_only_of(job)
    if said is None:
        return None
    with titan().importing():  # only such a job needs this from the host
        from ezpz_moe.hosts.titan.train_only import train_only
    return train_only(spec, said, flavor)


def _sections(job: Job, flavor: Flavor, spec: ModelSpec) -> dict[str, Any]:
    """Return the sections that differ from the host's defaults before single fields are set."""
    sections = {
        "model_spec": spec,
        "hf_assets_path": str(EMBEDDED_TOKENIZER),
        "loss": ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
        ),
        "optimizer": default_adamw(),
        "training": TrainingConfig(disable_cuda_graphs=True),
        "dataloader": _dataloader(job, "training", flavor, infinite=True),
        "checkpoint": Checkpointer.Config(
            last_save_model_only=False,
            _is_last_save_ours="checkpoint.last_save_model_only" not in job.values,
        ),
    }
    if validator := _validator(job, flavor):
        sections["validator"] = validator
        if not _names_validation_text(job):
            sections["training_text"] = validator.dataloader
    if (mode := job.values.get("activation_checkpoint.mode")) is not None:
        policy = _ACTIVATION_CHECKPOINTING[mode]
        sections["activation_checkpoint"] = policy() if policy else None
    return sections


def _validator(job: Job, flavor: Flavor) -> Validator.Config | None:
    """Return the validator of the job's text; without one of its own, of our text of training.

    None is the host's default, which streams a text of the Hub: it suits a training that does.
    """
    if not _names_validation_text(job):
        if not is_ours(job.values.get("training.dataset")):
            return None
        data = _dataloader(job, "training", flavor, infinite=False)
        return WholeTextValidator.Config(dataloader=data)
    data = _dataloader(job, "validation", flavor, infinite=False)
    # The host's datasets are streamed: counting would mean downloading them before the first step.
    is_counted = is_ours(job.values.get("validation.dataset"))
    return (WholeTextValidator if is_counted else Validator).Config(dataloader=data)


def _names_validation_text(job: Job) -> bool:
    return not job.values.keys().isdisjoint({"validation.dataset", "validation.dataset_path"})


def _dataloader(job: Job, section: str, flavor: Flavor, *, infinite: bool) -> Configurable.Config:
    dataset, path = (job.values.get(f"{section}.{key}") for key in ("dataset", "dataset_path"))
    try:
        data = titan().dataloader_config(dataset, path, job_folder=job.folder, infinite=infinite)
    except EzpzError as error:
        raise EzpzError(f"{job.source}: [{section}] {error}") from error
    if flavor.router.padding != "labels":
        return data
    with titan().importing():  # only such a flavor needs this from the host
        from ezpz_moe.hosts.titan.labelled import labelled

        return labelled(data)


def _arguments(job: Job, **keys: str) -> dict[str, Any]:
    """Return keyword arguments from those of the job's keys that are set."""
    return {name: job.values[key] for name, key in keys.items() if key in job.values}


def _field_values(job: Job) -> dict[str, Any]:
    """Return path in ``Trainer.Config`` -> value, for the keys that set fields."""
    try:
        values = titan().work(job.values)
    except EzpzError as error:
        raise EzpzError(f"{job.source}: {error}") from error
    keys = titan().job_keys()
    for key, value in job.values.items():
        section, _, name = key.rpartition(".")
        row = keys[section][name]
        if row.path is not None:
            values[row.path] = job.resolve(value) if row.is_file else value
    return values


def _cpu_values(job: Job) -> dict[str, Any]:
    """Return what works on the CPU instead of the host's default, unless the job sets it."""
    if utils.device_type != "cpu" or gloo.SPMD in job.values:
        return {}
    section = "parallelism."
    own = [key for key in job.values if key.startswith(section)]
    found = gloo.why_not_spmd_types({key.removeprefix(section): job.values[key] for key in own})
    if found is None:
        return {}
    setting, reason = found
    logger.info(f'ezpz_moe: {gloo.SPMD} = "{gloo.INSTEAD}" for {setting} on the CPU: {reason}')
    return {gloo.SPMD: gloo.INSTEAD}


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _changed(node: Any, changes: Any) -> Any:
    """Return a copy of a config with some fields changed; every dataclass checks itself."""
    if not isinstance(changes, dict):
        return changes
    if isinstance(node, dict):
        return node | {name: _changed(node.get(name), change) for name, change in changes.items()}
    if isinstance(node, list | tuple):
        return type(node)(
            _changed(item, changes[str(i)]) if str(i) in changes else item
            for i, item in enumerate(node)
        )
    # replace() runs __post_init__ again, which setattr would skip.
    return dataclasses.replace(
        node, **{name: _changed(getattr(node, name), change) for name, change in changes.items()}
    )


def _refuse_options_of_another_mode(
    job: Job, policy: ActivationCheckpointing.Config | None
) -> None:
    """Refuse an option that the chosen activation checkpointing lacks and would ignore."""
    for name, row in titan().job_keys()["activation_checkpoint"].items():
        if row.path is None or f"activation_checkpoint.{name}" not in job.values:
            continue
        option = row.path.rpartition(".")[2]
        if not hasattr(policy, option):
            modes = [
                f'"{mode}"'
                for mode, known in _ACTIVATION_CHECKPOINTING.items()
                if known is not None and hasattr(known(), option)
            ]
            raise EzpzError(
                f"{job.source}: [activation_checkpoint] {name} has no effect in the chosen mode. "
                f"Remove it, or set mode to {' or '.join(modes)}."
            )


@contextlib.contextmanager
def _refusals(source: str) -> Iterator[None]:
    """Report what a config of the host refuses in its constructor as a user's mistake."""
    try:
        yield
    except ValueError as error:
        raise EzpzError(f"{source}: torchtitan refuses a setting: {error}") from error
