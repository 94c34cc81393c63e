"""Define what the plugin asks of a trainer, and so what a binding to a new host has to provide.

A host is one generation of torchtitan. Each has a class: ``hosts/titan/v0_3.py`` and the newer
files beside it, ``hosts/titan_0_2/v0_2.py``. :mod:`ezpz_moe.hosts.detect` finds the installed one.

Every host has the abstract methods. It may lack the parts at the end of this file. Each part is a
Protocol, and the module that defines its functions is the part. The host's own types are Protocols
too.

Neither this file nor a subclass's imports torch or the host at module level: that takes seconds,
and reading a job needs neither. Code that is built from the host's classes lives in modules beside
the subclass. Its methods import them inside :meth:`Host.importing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.reliance import Reliance, in_words, is_written
from ezpz_moe.hosts.untested import installed_pair

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ezpz_moe.config.flavor_schema import ExpertPrecision
    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.config.job import Job
    from ezpz_moe.config.keys import Keys
    from ezpz_moe.hosts import accounting
    from ezpz_moe.hosts.architecture import Architecture
    from ezpz_moe.hosts.model_summary import ModelSummary
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
    """

    generation: ClassVar[str]
    name: ClassVar[str]
    evidence: ClassVar[Reliance]
    checkpoint_names: ClassVar[str]
    launcher_variables: ClassVar[tuple[str, ...]]

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
    def trainer_config(self, job: Job) -> TrainerConfig:
        """Return the trainer's config for a job.

        Raises:
            EzpzError: the flavor, the data or a combination of settings is wrong; the message
                names the job.
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

    @abstractmethod
    def flags(self, config: TrainerConfig) -> frozenset[str]:
        """Return the flags of the host's command line, as paths: ``--a.b-c`` is ``a.b_c``."""

    @abstractmethod
    def precision_in_words(self, config: TrainerConfig, flavor: Flavor) -> str:
        """Describe the precision of a run of ``config`` with the model of ``flavor``."""

    # --- models -----------------------------------------------------------------------------------

    @abstractmethod
    def summarize(self, flavor: Flavor) -> ModelSummary:
        """Return the dimensions and parameter counts of the flavor's model.

        Raises:
            EzpzError: the host cannot build the model.
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
            EzpzError: this host has no such part; the next four methods raise the same.
        """
        self._lacks("overrides")

    def anatomy(self) -> Anatomy:
        """Return the part that counts what a model costs, for ``ezpz-moe describe``."""
        self._lacks("anatomy")

    def memory(self) -> Memory:
        """Return the part that counts what a rank holds, for ``ezpz-moe describe``."""
        self._lacks("memory")

    def analysis(self) -> Analysis:
        """Return the part that runs the model on a text, for ``ezpz-moe analyze``."""
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


# --- the host's own types -----------------------------------------------------------------------


class TrainerConfig(Protocol):
    """The config of a run; besides these sections it has whatever the host has."""

    training: Any
    parallelism: Any


class StateDictAdapter(Protocol):
    """Converts names and layouts of one model's parameters between the host and Hugging Face."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert the host's parameters to Hugging Face's."""

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert Hugging Face's parameters to the host's."""


# --- the parts ----------------------------------------------------------------------------------


class Overrides(Protocol):
    """Replaces nodes of any config, if the user names an override on the command line."""

    def for_experts(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``factory`` for the host's experts, and return it."""

    def for_attention(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``factory`` for the host's attention, and return it."""

    def selected(
        self,
        config: Any,
        backend: str,
        chosen_by: str,
        expert_precision: ExpertPrecision | None = None,
    ) -> Any:
        """Return the config of the same experts, computed by ``backend``.

        Raises:
            EzpzError: unknown backend, or it cannot compute these experts.
        """

    def causal_attention(self, config: Any) -> Any:
        """Return the config of the SDPA kernel that replaces ``config.inner_attention``."""

    def turn_off_cuda_graphs_for(self, backend: str) -> None:
        """Turn CUDA graphs off in the current run if ``backend`` copies to the host's memory."""

    def refuse_twins_of(self, door: str) -> None:
        """Refuse a run on several CPU ranks that would all start with the same values.

        Raises:
            EzpzError: they would.
        """

    def warn_of_emulation(self) -> None:
        """Say once how to train in the CPU's own precision."""


class Anatomy(Protocol):
    """Counts a model's parameters and FLOPs by component, and finds the sequence length."""

    def anatomy(self, flavor: Flavor, seq_len: int) -> accounting.Anatomy:
        """Return the components, with attention computed within ``seq_len`` tokens.

        Raises:
            EzpzError: the host cannot build the model, or its attention does not show its heads.
        """

    def sequence_length(self, config: str, host_flags: list[str]) -> int:
        """Return the tokens per sequence of a job, after the trainer's own flags.

        Raises:
            EzpzError: the job is wrong. A flag that the trainer does not know ends the process.
        """

    def precision_in_words(self, config: str, host_flags: list[str], flavor: Flavor) -> str:
        """Describe the precision of a job, after the trainer's own flags. Raises the same."""


class Pipeline(Protocol):
    """How a job divides work into a pipeline: stages, torch's schedule, microbatches per step."""

    @property
    def stages(self) -> int: ...

    @property
    def schedule(self) -> str: ...

    @property
    def microbatches(self) -> int: ...


class Memory(Protocol):
    """Counts what a rank holds, in bytes by part and component of the model.

    Arguments are those of :meth:`Host.run_rank`. Methods that report on a rank can be called once
    per process.
    """

    def fewest_ranks(self, config: str, host_flags: list[str]) -> int:
        """Return the fewest ranks that the job's degrees allow.

        Raises:
            EzpzError: as :meth:`pipeline`.
        """

    def pipeline(self, config: str, host_flags: list[str]) -> Pipeline:
        """Return the job's pipeline.

        Raises:
            EzpzError: the job is wrong. A flag that the trainer does not know ends the process.
        """

    def weights(self, config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
        """Report the weights that the rank holds."""

    def activations(
        self, config: str, host_flags: list[str], world_size: int, rank: int
    ) -> RankReport:
        """Report what one microbatch's forward leaves for backward, with accelerator kernels."""

    def activations_on_cpu(
        self, config: str, host_flags: list[str], world_size: int, rank: int
    ) -> RankReport:
        """Report the same with torch's kernels on the CPU."""


class Analysis(Protocol):
    """Runs a flavor's model on a text. L = sequence length, V = vocabulary, K = experts per token.

    ``model`` is always what :meth:`build` has returned.
    """

    def build(self, flavor: Flavor, length: int, *, device: str) -> nn.Module:
        """Build the model on ``device``, with the host's settings for sequences of ``length``.

        Raises:
            EzpzError: the host refuses the model or the length.
        """

    def forward(self, model: nn.Module, tokens_L: Tensor, positions_L: Tensor) -> Tensor:
        """Return the logits [L, V] of one sequence."""

    def routers(self, model: nn.Module) -> dict[str, Any]:
        """Return the router of each layer with experts, by layer name; it has ``num_experts``."""

    def chosen(self, output: Any) -> Tensor:
        """Return the experts in a router's output: [..., K]."""

    def expert_weights(self, model: nn.Module) -> dict[str, list[Tensor]]:
        """Return the routed experts' parameters [E, ...], by layer name."""

    def at_step(self, model: nn.Module, step: int) -> None:
        """Set what the flavor schedules to its value at a training step."""

    def encoder(self, folder: str) -> Callable[[str], list[int]]:
        """Return a function that encodes a document, with the marks that the trainer adds.

        Raises:
            EzpzError: ``folder`` has no tokenizer.
        """
