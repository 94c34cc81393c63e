"""Define what the plugin asks of a trainer, and so what a binding to a new host has to provide.

A host is one generation of torchtitan. Each has a class: ``hosts/titan/v0_3.py`` and the newer
files beside it, ``hosts/titan_0_2/v0_2.py``. :mod:`ezpz_moe.hosts.detect` finds the installed one.

For a new host, write a subclass with every abstract method. Methods that return a part are not
abstract, because a host may lack the part. :mod:`ezpz_moe.hosts.parts` has what each part has to
define, and what the host's own types are known to have.

Neither this file nor a subclass's imports torch or the host at module level: that takes seconds,
and reading a job needs neither. Code that is built from the host's classes lives in modules beside
the subclass. Its methods import them inside :meth:`Host.importing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, NoReturn

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.command_line import HostFlag, flags_of
from ezpz_moe.hosts.reliance import Reliance, in_words, is_written
from ezpz_moe.hosts.untested import installed_pair

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
        TrainerConfig,
    )
    from ezpz_moe.hosts.rank_report import RankReport
    from ezpz_moe.hosts.setting import Setting
    from ezpz_moe.hosts.upcycling_target import Target


class Host(ABC):
    """One generation of the trainer, and how the plugin works with it.

    Attributes:
        generation: short name: the version of its first release, or year and month.
        name: its name for people.
        evidence: what this generation has and older ones lack.
        checkpoint_names: the generation in ``tools/checkpoints/names.py`` that names its
            parameters.
        launcher_variables: environment variables that pass the job to the host's ``run_train.sh``.
        trains_on_chats: whether a job's data may be a file of chats.
    """

    generation: ClassVar[str]
    name: ClassVar[str]
    evidence: ClassVar[Reliance]
    checkpoint_names: ClassVar[str]
    launcher_variables: ClassVar[tuple[str, ...]]
    trains_on_chats: ClassVar[bool] = False

    # --- without torch and the host ---------------------------------------------------------------

    @property
    @abstractmethod
    def relied_on(self) -> tuple[Reliance, ...]:
        """What the binding needs from the host, in addition to the evidence."""

    @property
    @abstractmethod
    def state_dict_keys(self) -> tuple[str, ...]:
        """Sample keys of a ``debugmodel`` checkpoint: those of a layer with experts."""

    @abstractmethod
    def modules(self) -> tuple[str, ...]:
        """Return the names of the modules that form the binding, without importing them."""

    @abstractmethod
    def job_keys(self) -> Keys:
        """Return the keys of a job's TOML, and what each becomes."""

    @abstractmethod
    def arguments(self, job: Job) -> list[str]:
        """Return the arguments of ``torchtitan.train`` that train the job."""

    @abstractmethod
    def one_step(self, folder: str) -> list[str]:
        """Return the flags for a run of one step that writes only to ``folder``."""

    @property
    def is_written(self) -> bool:
        """Whether the host's files contain the evidence; this imports nothing."""
        return is_written(self.evidence)

    # --- a job in the host's words ----------------------------------------------------------------

    @abstractmethod
    def trainer_config(self, job: Job, host_flags: Sequence[str] = ()) -> TrainerConfig:
        """Return the trainer's config for a job.

        Args:
            job: what is trained.
            host_flags: the trainer's own flags, which override the job.

        Raises:
            EzpzError: the flavor, the data, a flag or a combination of settings is wrong; the
                message names the job.
        """

    def job_config(self) -> type:
        """Return the class that the host merges into its config, for the job on its command line.

        Raises:
            AttributeError: the host merges nothing.
            EzpzError: the job's file is wrong, or asks for what the host does not have.
        """
        # An AttributeError, because `ezpz_moe.JobConfig` is looked up as an attribute: on a host
        # that merges no config the package should look as if it did not have one.
        raise AttributeError(f"{self.name} merges no JobConfig")

    @abstractmethod
    def machine_problems(
        self, config: TrainerConfig, flavor: Flavor, ranks: int | None
    ) -> list[str]:
        """Return why this machine cannot run the job, before there is a run.

        Args:
            config: as :meth:`trainer_config` returns it.
            flavor: the job's.
            ranks: ranks in the run; None if not known.
        """

    @abstractmethod
    def settings(self, config: TrainerConfig) -> list[Setting]:
        """Return every field of the trainer's config except the model, in the host's order."""

    def command_line(self, config: TrainerConfig) -> list[HostFlag]:
        """Return the flags of the host's command line for ``config``, with its defaults."""
        with self.importing():
            from torchtitan.config.manager import ConfigManager, custom_registry
        ConfigManager()  # gives the registry its rules
        return flags_of(type(config), config, custom_registry)

    @abstractmethod
    def precision_in_words(self, config: TrainerConfig, flavor: Flavor) -> str:
        """Describe the precision of a run of ``config`` with the model of ``flavor``."""

    def remarks(self, config: TrainerConfig) -> list[str]:
        """Return what a run of ``config`` does that nobody may have meant."""
        return []

    @abstractmethod
    def learning_rate(self, config: TrainerConfig, steps: int) -> float:
        """Return the learning rate that the schedule has for the step after ``steps`` steps."""

    # --- models -----------------------------------------------------------------------------------

    @abstractmethod
    def summarize(self, flavor: Flavor) -> ModelSummary:
        """Return the dimensions and parameter counts of the flavor's model.

        Raises:
            EzpzError: the host cannot build the model.
        """

    @abstractmethod
    def needs_accelerator(self, flavor: Flavor) -> bool:
        """Return whether the flavor's attention has no backward on the CPU.

        Raises:
            EzpzError: as :meth:`summarize`.
        """

    @abstractmethod
    def build_on_meta(self, flavor: Flavor) -> nn.Module:
        """Build the flavor's model without allocating memory for it.

        Raises:
            EzpzError: as :meth:`summarize`.
        """

    @abstractmethod
    def experts_class(self) -> type[nn.Module]:
        """Return the host's routed experts with a selectable backend."""

    @abstractmethod
    def stock_experts(self) -> Callable[[Tensor, Tensor, Tensor], nn.Module]:
        """Return a function that makes the host's own experts of weights w1_EFD, w2_EDF and w3_EFD.

        The experts are called as ``(x_RD, num_tokens_per_expert_E) -> y_RD``. E = experts,
        D = model dimension, F = hidden dimension, R = routed rows.
        """

    @abstractmethod
    def adapter(self, flavor: Flavor) -> StateDictAdapter:
        """Return the host's own converter between its parameters of this model and Hugging Face's.

        Raises:
            EzpzError: the host has none for this model.
        """

    def architecture(self, flavor: Flavor) -> Architecture | None:
        """Return what the flavor's model computes; None if this binding does not read it.

        Raises:
            EzpzError: as :meth:`summarize`; or no class of transformers is known for the model.
        """
        return None

    def grouped_experts(self, flavor: Flavor) -> dict[int, tuple[int, int]] | None:
        """Return, by layer with experts, how many they are, and in how many groups.

        Without a limit of a token's choice all of them are one group. None if nobody knows.

        Raises:
            EzpzError: as :meth:`summarize`.
        """
        return None

    @abstractmethod
    def run_rank(
        self, config: str, host_flags: list[str], world_size: int, rank: int
    ) -> RankReport:
        """Build one rank of a big run and measure it. Once per process: the host has global state.

        Args:
            config: a flavor's name or the path of a job's TOML.
            host_flags: the trainer's own flags, which override the job.
            world_size: number of ranks in the run.
            rank: which one to build.

        Raises:
            whatever the rank would have raised until its model was parallelized.
        """

    # --- what a host may lack ---------------------------------------------------------------------

    def overrides(self) -> Overrides:
        """Return door 2: it puts a backend into any config of the host.

        Raises:
            EzpzError: this host has no such part; the next five methods raise the same.
        """
        self._lacks("overrides")

    def anatomy(self) -> Anatomy:
        """Return the part that counts what a model costs, for ``ezpz-moe describe``."""
        self._lacks("anatomy")

    def memory(self) -> Memory:
        """Return the part that counts what a rank holds, for ``ezpz-moe describe``."""
        self._lacks("memory")

    def planning(self) -> Planning:
        """Return the part that fills in a model's sheet, for ``ezpz-moe plan``."""
        self._lacks("planning")

    def analysis(self) -> Analysis:
        """Return the part that runs the model on a text: ``ezpz-moe analyze`` and ``generate``."""
        self._lacks("analysis")

    def upcycling_target(self, flavor: Flavor) -> Target:
        """Return the flavor's model and its layers with experts, for ``ezpz-moe upcycle``."""
        self._lacks("upcycling")

    def _lacks(self, part: str) -> NoReturn:
        raise EzpzError(f"ezpz_moe cannot do this with {self.name}: its binding has no {part}.")

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Turn errors from importing a module of the binding into a message for the user.

        The module makes its classes from the host's, so a changed host fails right there.

        Raises:
            EzpzError: whatever the host lacks or raises.
        """
        try:
            yield
        # Ours are for the user already.
        except EzpzError:
            raise
        # Not only ImportError: class bodies run on import, and a changed host breaks them with
        # AttributeError or TypeError.
        except Exception as error:
            titan = installed_pair()[1]
            raise EzpzError(
                f"ezpz_moe cannot do this with torchtitan {titan}: {in_words(error)}. "
                "`ezpz-moe doctor` shows what is broken and what that means."
            ) from error
