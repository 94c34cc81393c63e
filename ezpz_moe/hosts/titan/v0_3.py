"""torchtitan 0.3, and what later generations keep: batches of sequences, grouped experts.

The methods at the end answer what the other modules of this folder ask. Compare ``v2026_08.py``,
where most answers differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ezpz_moe.hosts.command_line import HostFlag
from ezpz_moe.hosts.reliance import Reliance
from ezpz_moe.hosts.titan.base import Experts, Sequences, Titan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.config.job import Job
    from ezpz_moe.config.keys import Keys
    from ezpz_moe.hosts.architecture import Architecture
    from ezpz_moe.hosts.model_summary import ModelSummary
    from ezpz_moe.hosts.parts import (
        Analysis,
        Anatomy,
        Memory,
        Overrides,
        Planning,
        StateDictAdapter,
    )
    from ezpz_moe.hosts.rank_report import RankReport
    from ezpz_moe.hosts.setting import Setting
    from ezpz_moe.hosts.titan.job import JobConfig
    from ezpz_moe.hosts.upcycling_target import Target


class Titan03(Titan):
    """torchtitan 0.3."""

    generation = "0.3"
    name = "torchtitan 0.3"
    evidence = Reliance(
        "torchtitan.config.override:derive",
        used_for="recognizing the host's generation",
        if_broken="this is older than torchtitan 0.3",
        takes=("source", "target_cls"),
        vital=True,
    )
    checkpoint_names = "0.3"
    launcher_variables = ("MODULE", "CONFIG")
    trains_on_chats = True

    @property
    def relied_on(self) -> tuple[Reliance, ...]:
        from ezpz_moe.hosts.titan.relied_on import RELIED_ON

        return RELIED_ON

    @property
    def state_dict_keys(self) -> tuple[str, ...]:
        from ezpz_moe.hosts.titan.relied_on import STATE_DICT_KEYS

        return STATE_DICT_KEYS

    def modules(self) -> tuple[str, ...]:
        # By file name and not by import: the list must not need torch or the host.
        lineage = {each.generation for each in type(self).__mro__ if issubclass(each, Titan03)}
        return tuple(_modules(lineage).values())

    def job_keys(self) -> Keys:
        from ezpz_moe.hosts.titan.job_keys import KEYS

        return KEYS

    def arguments(self, job: Job) -> list[str]:
        from ezpz_moe.hosts.titan.command import named

        # One argument of the host's for both: `find_job` tells them apart.
        return named(str(job.path or job.flavor))

    def one_step(self, folder: str) -> list[str]:
        return [
            # Flags, because they win over the job's file, whatever it says.
            *("--training.steps", "1", "--dump-folder", folder),
            *("--checkpoint.no-enable", "--validator.no-enable"),
            *("--metrics.no-enable-wandb", "--metrics.no-enable-tensorboard"),
        ]

    def trainer_config(self, job: Job, host_flags: Sequence[str] = ()) -> JobConfig:
        with self.importing():
            from ezpz_moe.hosts.titan.job import trainer_config
        return trainer_config(job, host_flags)

    def machine_problems(self, config: Any, flavor: Flavor, ranks: int | None) -> list[str]:
        with self.importing():
            from ezpz_moe.hosts.titan.conflicts import machine_problems
        # The flavor is not needed: its model is in the config.
        return machine_problems(config, ranks)

    def settings(self, config: Any) -> list[Setting]:
        with self.importing():
            from ezpz_moe.hosts.titan.settings import settings
        return settings(config)

    def command_line(self, config: Any) -> list[HostFlag]:
        # The host takes these from its arguments before tyro sees them.
        module = HostFlag("module", "STR", "ezpz_moe", "The module that has the config.")
        named = HostFlag("config", "STR", "", "The config: here a flavor, or the path of a job.")
        return [module, named, *super().command_line(config)]

    def precision_in_words(self, config: Any, flavor: Flavor) -> str:
        with self.importing():
            from ezpz_moe.hosts.titan.precision import in_words
        return in_words(config)

    def remarks(self, config: Any) -> list[str]:
        with self.importing():
            from ezpz_moe.hosts.titan.router_remarks import router_remarks
        return router_remarks(config)

    def learning_rate(self, config: Any, steps: int) -> float:
        with self.importing():
            from ezpz_moe.hosts.titan.learning_rate import learning_rate
        return learning_rate(config, steps)

    def summarize(self, flavor: Flavor) -> ModelSummary:
        with self.importing():
            from ezpz_moe.hosts.titan.parameters import summarize
        return summarize(flavor)

    def needs_accelerator(self, flavor: Flavor) -> bool:
        with self.importing():
            from ezpz_moe.hosts.titan.attention import has_masked_attention
            from ezpz_moe.hosts.titan.models import model_spec
        return has_masked_attention(model_spec(flavor))

    def build_on_meta(self, flavor: Flavor) -> nn.Module:
        with self.importing():
            from ezpz_moe.hosts.titan.parameters import build_on_meta
        return build_on_meta(flavor)

    def experts_class(self) -> type[nn.Module]:
        return self.experts().EzpzGroupedExperts

    def stock_experts(self) -> Callable[[Tensor, Tensor, Tensor], nn.Module]:
        with self.importing():
            from ezpz_moe.hosts.titan.stock import stock_experts
        return stock_experts

    def adapter(self, flavor: Flavor) -> StateDictAdapter:
        with self.importing():
            from ezpz_moe.hosts.titan.huggingface import adapter
        return adapter(flavor)

    def architecture(self, flavor: Flavor) -> Architecture:
        with self.importing():
            from ezpz_moe.hosts.titan.architecture import architecture
        return architecture(flavor)

    def grouped_experts(self, flavor: Flavor) -> dict[int, tuple[int, int]]:
        with self.importing():
            from ezpz_moe.hosts.titan.architecture import grouped_experts
        return grouped_experts(flavor)

    def run_rank(
        self, config: str, host_flags: list[str], world_size: int, rank: int
    ) -> RankReport:
        with self.importing():
            from ezpz_moe.hosts.titan.preflight import run_rank
        return run_rank(config, host_flags, world_size, rank)

    def overrides(self) -> Overrides:
        with self.importing():
            from ezpz_moe.hosts.titan import overrides
        return overrides

    def anatomy(self) -> Anatomy:
        with self.importing():
            from ezpz_moe.hosts.titan import anatomy
        return anatomy

    def memory(self) -> Memory:
        with self.importing():
            from ezpz_moe.hosts.titan import memory
        return memory

    def planning(self) -> Planning:
        with self.importing():
            from ezpz_moe.hosts.titan import planning
        return planning

    def analysis(self) -> Analysis:
        with self.importing():
            from ezpz_moe.hosts.titan import analysis
        return analysis

    def upcycling_target(self, flavor: Flavor) -> Target:
        with self.importing():
            from ezpz_moe.hosts.titan.upcycling import target
        return target(flavor)

    # --- for the modules of this folder -----------------------------------------------------------

    LENGTH = "training.seq_len"
    LONGEST = "max_seq_len"
    # The loss cuts along the sequence, a dimension of its own on this host.
    CUT_BY_LOSS = "training.seq_len"
    STEP = "training.global_batch_size"
    MICROBATCH = "training.local_batch_size"

    def microbatches(self, parallelism: Any) -> int:
        return 1  # a pipeline divides that one further

    def work(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {}  # the host has a field for every key

    def one_sequence(self, length: int) -> tuple[int, ...]:
        return (1, length)  # a batch of one: [B, L]

    def sequences(self, training: Any, parallelism: Any, data_ranks: int) -> Sequences:
        whole, batch = training.global_batch_size, training.local_batch_size
        piped = parallelism.pipeline_parallel_degree > 1
        return Sequences(
            # -1: as little as possible, one microbatch of every rank.
            of_step=batch * data_ranks if whole < 0 else whole,
            of_microbatch=parallelism.pipeline_parallel_microbatch_size if piped else batch,
            length=training.seq_len,
        )

    def fit_model(self, config: Any) -> None:
        """Do nothing: the model already has everything."""

    def own_conflicts(self, config: Any) -> Iterator[str]:
        return iter(())

    def experts(self) -> Experts:
        with self.importing():
            from ezpz_moe.hosts.titan import experts
        return experts

    def causal_attention(self, config: Any) -> Any:
        with self.importing():
            from ezpz_moe.hosts.titan.attention import causal_attention
        return causal_attention(config)

    def validation_batches(self, validator: Any) -> tuple[dict[str, Any], int]:
        batch, microbatches = validator.local_batch_size, 1
        if validator.parallel_dims.pp_enabled:
            size = validator.parallelism.pipeline_parallel_microbatch_size
            batch, microbatches = size, batch // size
        return {"seq_len": validator.seq_len, "local_batch_size": batch}, microbatches

    def dataloader_config(
        self,
        dataset: str | None,
        dataset_path: str | None,
        *,
        job_folder: Path | None,
        infinite: bool = True,
    ) -> Any:
        with self.importing():
            from ezpz_moe.hosts.titan.data import dataloader_config
        return dataloader_config(dataset, dataset_path, job_folder=job_folder, infinite=infinite)


def _modules(lineage: set[str]) -> dict[str, str]:
    """Return name without date -> module of this folder, the newest that a generation has.

    Args:
        lineage: the generation and those that it builds on.
    """
    newest: dict[str, str] = {}
    for each in sorted(found.name for found in iter_modules([str(Path(__file__).parent)])):
        if re.match(r"v\d", each):  # a generation's class
            continue
        date = re.search(r"_(\d{4}_\d{2})$", each)
        if date is None or date[1] in lineage:  # sorted, so a dated name comes after the plain one
            newest[each.removesuffix(date[0]) if date else each] = f"{__package__}.{each}"
    return newest
