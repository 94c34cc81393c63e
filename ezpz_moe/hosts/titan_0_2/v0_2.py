"""torchtitan 0.2. Frozen: bugs get fixed, but new features need 0.3.

Parts that it lacks keep the defaults of :class:`ezpz_moe.hosts.host.Host`, which raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ezpz_moe.hosts.host import Host
from ezpz_moe.hosts.reliance import Reliance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.config.job import Job
    from ezpz_moe.config.keys import Keys
    from ezpz_moe.hosts.model_summary import ModelSummary
    from ezpz_moe.hosts.parts import StateDictAdapter
    from ezpz_moe.hosts.rank_report import RankReport
    from ezpz_moe.hosts.setting import Setting


class Titan02(Host):
    """torchtitan 0.2."""

    generation = "0.2"
    name = "torchtitan 0.2"
    evidence = Reliance(
        # 0.3 has no TrainSpec; ModelSpec took its place.
        "torchtitan.protocols.train_spec:register_train_spec",
        used_for="recognizing the host's generation",
        if_broken="this is neither torchtitan 0.2 nor 0.3",
        vital=True,
    )
    checkpoint_names = "0.2"
    launcher_variables = ("CONFIG_FILE",)

    @property
    def relied_on(self) -> tuple[Reliance, ...]:
        from ezpz_moe.hosts.titan_0_2.relied_on import RELIED_ON

        return RELIED_ON

    @property
    def state_dict_keys(self) -> tuple[str, ...]:
        from ezpz_moe.hosts.titan_0_2.relied_on import STATE_DICT_KEYS

        return STATE_DICT_KEYS

    def modules(self) -> tuple[str, ...]:
        # By file name and not by import: the list must not need torch or the host.
        found = iter_modules([str(Path(__file__).parent)])
        return tuple(f"{__package__}.{each.name}" for each in found)

    def job_keys(self) -> Keys:
        from ezpz_moe.hosts.titan_0_2.job_keys import KEYS

        return KEYS

    def arguments(self, job: Job) -> list[str]:
        from ezpz_moe.hosts.titan_0_2.command import arguments

        return arguments(job)

    def one_step(self, folder: str) -> list[str]:
        return [
            # Flags, because they win over the job's file, whatever it says.
            *("--training.steps", "1", "--job.dump-folder", folder),
            *("--checkpoint.no-enable", "--validation.no-enable"),
            *("--metrics.no-enable-wandb", "--metrics.no-enable-tensorboard"),
        ]

    def trainer_config(self, job: Job, host_flags: Sequence[str] = ()) -> Any:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.job import trainer_config
        return trainer_config(job, host_flags)

    def job_config(self) -> type:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.job import job_config
        return job_config()

    def machine_problems(self, config: Any, flavor: Flavor, ranks: int | None) -> list[str]:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.conflicts import machine_problems
        return machine_problems(config, flavor, ranks)

    def settings(self, config: Any) -> list[Setting]:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.settings import settings
        return settings(config)

    def precision_in_words(self, config: Any, flavor: Flavor) -> str:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.precision import in_words
        return in_words(config, flavor)

    def learning_rate(self, config: Any, steps: int) -> float:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.learning_rate import learning_rate
        return learning_rate(config, steps)

    def summarize(self, flavor: Flavor) -> ModelSummary:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.parameters import summarize
        return summarize(flavor)

    def needs_accelerator(self, flavor: Flavor) -> bool:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.models import model_args
        return model_args(flavor).attn_type != "sdpa"

    def build_on_meta(self, flavor: Flavor) -> nn.Module:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.parameters import build_on_meta
        return build_on_meta(flavor)

    def experts_class(self) -> type[nn.Module]:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.experts import EzpzGroupedExperts
        return EzpzGroupedExperts

    def stock_experts(self) -> Callable[[Tensor, Tensor, Tensor], nn.Module]:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.stock import stock_experts
        return stock_experts

    def adapter(self, flavor: Flavor) -> StateDictAdapter:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.huggingface import adapter
        return adapter(flavor)

    def run_rank(
        self, config: str, host_flags: list[str], world_size: int, rank: int
    ) -> RankReport:
        with self.importing():
            from ezpz_moe.hosts.titan_0_2.preflight import run_rank
        return run_rank(config, host_flags, world_size, rank)
