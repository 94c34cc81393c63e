"""Everything that the plugin asks of a trainer: what to write for a new host.

A host is one generation of torchtitan, and a class here: ``hosts/titan/v0_3.py`` and its newer
sisters, ``hosts/titan_0_2/v0_2.py``. :mod:`ezpz_moe.hosts.detect` says which one is installed.

What is abstract every host has. The parts at the end a host may lack. A part is a Protocol, and the
module that has its functions is the part. The host's own types are Protocols too.

Neither this file nor a subclass's imports torch or the host at its head: that takes seconds, and a
job is read without. What is made from the host's classes lies in modules beside the subclass,
which its methods import within :meth:`Host.importing`.
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
    from ezpz_moe.hosts.model_summary import ModelSummary
    from ezpz_moe.hosts.rank_report import RankReport
    from ezpz_moe.hosts.setting import Setting
    from ezpz_moe.hosts.upcycling_target import Target


class Host(ABC):
    """One generation of the trainer, and how the plugin works with it.

    Attributes:
        generation: its short name: a version of the first release, or year and month.
        name: its name for people.
        evidence: what this generation has and the older ones lack.
        checkpoint_names: the generation in ``tools/checkpoints/names.py`` whose names its
            parameters have.
        launcher_variables: what tells the host's own ``run_train.sh`` the job.
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
        """What the binding needs of the host, in addition to the evidence."""

    @property
    @abstractmethod
    def state_dict_keys(self) -> tuple[str, ...]:
        """Some keys of a checkpoint of ``debugmodel``: those of a layer with experts."""

    @abstractmethod
    def modules(self) -> tuple[str, ...]:
        """The modules that the binding consists of, by name; nothing is imported."""

    @abstractmethod
    def job_keys(self) -> Keys:
        """The keys of a job's TOML, and what each becomes."""

    @abstractmethod
    def arguments(self, job: Job) -> list[str]:
        """Arguments of ``torchtitan.train`` that train the job."""

    @abstractmethod
    def one_step(self, folder: str) -> list[str]:
        """Flags for a run of one step that writes to ``folder`` only."""

    @property
    def is_written(self) -> bool:
        """Whether the host's files have the evidence; nothing is imported."""
        return is_written(self.evidence)

    # --- a job in the host's words ----------------------------------------------------------------

    @abstractmethod
    def trainer_config(self, job: Job) -> TrainerConfig:
        """The trainer's config of a job.

        Raises:
            EzpzError: the flavor, the data or a combination of settings is wrong; the message
                names the job.
        """

    def job_config(self) -> type:
        """What the host merges into its own config class, for the job on its command line.

        Raises:
            AttributeError: the host merges nothing.
            EzpzError: the job's file is wrong, or asks for what the host does not have.
        """
        raise AttributeError(f"{self.name} merges no JobConfig")

    @abstractmethod
    def machine_problems(
        self, config: TrainerConfig, flavor: Flavor, ranks: int | None
    ) -> list[str]:
        """What excludes this machine, asked before there is a run.

        Args:
            config: as :meth:`trainer_config` returns it.
            flavor: the job's.
            ranks: of the run; None: whatever number.
        """

    @abstractmethod
    def settings(self, config: TrainerConfig) -> list[Setting]:
        """Every field of the trainer's config, the model left out, in the host's order."""

    @abstractmethod
    def flags(self, config: TrainerConfig) -> frozenset[str]:
        """The flags of the host's command line, as paths: ``--a.b-c`` is ``a.b_c``."""

    @abstractmethod
    def precision_in_words(self, config: TrainerConfig, flavor: Flavor) -> str:
        """Which precision applies to a run of ``config``, whose model is ``flavor``'s."""

    # --- models -----------------------------------------------------------------------------------

    @abstractmethod
    def summarize(self, flavor: Flavor) -> ModelSummary:
        """Dimensions and parameter counts of the flavor's model.

        Raises:
            EzpzError: the host cannot build the model.
        """

    @abstractmethod
    def build_on_meta(self, flavor: Flavor) -> nn.Module:
        """The flavor's model. No memory is allocated for it.

        Raises:
            EzpzError: as :meth:`summarize`.
        """

    @abstractmethod
    def experts_class(self) -> type[nn.Module]:
        """The host's routed experts with a selectable backend."""

    @abstractmethod
    def stock_experts(self) -> Callable[[Tensor, Tensor, Tensor], nn.Module]:
        """Makes the host's own experts of their weights w1_EFD, w2_EDF and w3_EFD.

        They are called as ``(x_RD, num_tokens_per_expert_E) -> y_RD``. E = experts, D = model
        dimension, F = hidden dimension, R = routed rows.
        """

    @abstractmethod
    def adapter(self, flavor: Flavor) -> StateDictAdapter:
        """The host's own way between its parameters of this model and Hugging Face's.

        Raises:
            EzpzError: the host has none for this model.
        """

    @abstractmethod
    def run_rank(
        self, config: str, host_flags: list[str], world_size: int, rank: int
    ) -> RankReport:
        """Build one rank of a big run and measure it. Once per process: the host has global state.

        Args:
            config: a flavor's name or the path of a job's TOML.
            host_flags: the trainer's own flags, which override the job.
            world_size: ranks of the run.
            rank: which one to build.

        Raises:
            whatever the rank would have met until its model was parallelized.
        """

    # --- what a host may lack ---------------------------------------------------------------------

    def overrides(self) -> Overrides:
        """Door 2: a backend for any config of the host.

        Raises:
            EzpzError: this host has no such part; the next four raise the same.
        """
        self._lacks("overrides")

    def anatomy(self) -> Anatomy:
        """What a model costs, for ``ezpz-moe describe``."""
        self._lacks("anatomy")

    def memory(self) -> Memory:
        """What a rank holds, for ``ezpz-moe describe``."""
        self._lacks("memory")

    def analysis(self) -> Analysis:
        """The model run on a text, for ``ezpz-moe analyze``."""
        self._lacks("analysis")

    def upcycling_target(self, flavor: Flavor) -> Target:
        """The flavor's model and its layers with experts, for ``ezpz-moe upcycle``."""
        self._lacks("upcycling")

    def _lacks(self, part: str) -> NoReturn:
        raise EzpzError(f"ezpz_moe cannot do this with {self.name}: its binding has no {part}.")

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Around the import of a module of the binding: its classes are made from the host's.

        Raises:
            EzpzError: whatever the host lacks or raises.
        """
        try:
            yield
        except EzpzError:
            raise
        except Exception as error:
            titan = installed_pair()[1]
            raise EzpzError(
                f"ezpz_moe cannot do this with torchtitan {titan}: {in_words(error)}. "
                "`ezpz-moe doctor` shows what is broken and what that means."
            ) from error


# --- the host's own types -----------------------------------------------------------------------


class TrainerConfig(Protocol):
    """The config of a run; apart from these sections it has whatever the host has."""

    training: Any
    parallelism: Any


class StateDictAdapter(Protocol):
    """Names and layouts of one model's parameters, as the host and as Hugging Face have them."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The host's parameters as Hugging Face's."""

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hugging Face's as the host's."""


# --- the parts ----------------------------------------------------------------------------------


class Overrides(Protocol):
    """Replacing nodes of any config, where the user names an override on the command line."""

    def for_experts(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``factory`` for the host's experts; ``factory`` itself."""

    def for_attention(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``factory`` for the host's attention; ``factory`` itself."""

    def selected(
        self,
        config: Any,
        backend: str,
        chosen_by: str,
        expert_precision: ExpertPrecision | None = None,
    ) -> Any:
        """The config of the same experts, computed by ``backend``.

        Raises:
            EzpzError: unknown backend, or these experts cannot be computed by it.
        """

    def causal_attention(self, config: Any) -> Any:
        """The config of the SDPA kernel that stands in for ``config.inner_attention``."""

    def turn_off_cuda_graphs_for(self, backend: str) -> None:
        """In the run at hand, where ``backend`` copies to the host's memory."""

    def refuse_twins_of(self, door: str) -> None:
        """Refuse a run whose several CPU ranks would start with the same values.

        Raises:
            EzpzError: it would.
        """

    def warn_of_emulation(self) -> None:
        """Say once how to train in the CPU's own precision."""


class Anatomy(Protocol):
    """A model's parameters and FLOPs by component, and the lengths that they depend on."""

    def anatomy(self, flavor: Flavor, seq_len: int) -> accounting.Anatomy:
        """The components; attention is computed within ``seq_len`` tokens.

        Raises:
            EzpzError: the host cannot build the model, or its attention does not show its heads.
        """

    def sequence_length(self, config: str, host_flags: list[str]) -> int:
        """Tokens of a sequence in a job, after the trainer's own flags.

        Raises:
            EzpzError: the job is wrong. A flag that the trainer does not know ends the process.
        """

    def precision_in_words(self, config: str, host_flags: list[str], flavor: Flavor) -> str:
        """Which precision applies to a job, after the trainer's own flags. Raises the same."""


class Pipeline(Protocol):
    """How a job's ranks work one after another: stages, torch's schedule, microbatches a step."""

    @property
    def stages(self) -> int: ...

    @property
    def schedule(self) -> str: ...

    @property
    def microbatches(self) -> int: ...


class Memory(Protocol):
    """What a rank holds, in bytes by part and component of the model.

    Arguments are those of :meth:`Host.run_rank`; what reports of a rank may be called once per
    process.
    """

    def fewest_ranks(self, config: str, host_flags: list[str]) -> int:
        """The fewest ranks that the job's degrees allow.

        Raises:
            EzpzError: as :meth:`pipeline`.
        """

    def pipeline(self, config: str, host_flags: list[str]) -> Pipeline:
        """The job's.

        Raises:
            EzpzError: the job is wrong. A flag that the trainer does not know ends the process.
        """

    def weights(self, config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
        """Of the weights that the rank holds."""

    def activations(
        self, config: str, host_flags: list[str], world_size: int, rank: int
    ) -> RankReport:
        """Of what one microbatch's forward leaves for backward, with an accelerator's kernels."""

    def activations_on_cpu(
        self, config: str, host_flags: list[str], world_size: int, rank: int
    ) -> RankReport:
        """The same with torch's kernels on the CPU."""


class Analysis(Protocol):
    """A flavor's model run on a text. L = sequence length, V = vocabulary, K = experts of a token.

    ``model`` is always what :meth:`build` has returned.
    """

    def build(self, flavor: Flavor, length: int, *, device: str) -> nn.Module:
        """The model on ``device``, with the host's settings for sequences of ``length``.

        Raises:
            EzpzError: the host refuses the model or the length.
        """

    def forward(self, model: nn.Module, tokens_L: Tensor, positions_L: Tensor) -> Tensor:
        """The logits [L, V] of one sequence."""

    def routers(self, model: nn.Module) -> dict[str, Any]:
        """The router of each layer with experts, by the layer's name; it has ``num_experts``."""

    def chosen(self, output: Any) -> Tensor:
        """The experts in what a router returns: [..., K]."""

    def expert_weights(self, model: nn.Module) -> dict[str, list[Tensor]]:
        """The routed experts' parameters [E, ...], by the layer's name."""

    def at_step(self, model: nn.Module, step: int) -> None:
        """Put what a flavor schedules to its value in a training step."""

    def encoder(self, folder: str) -> Callable[[str], list[int]]:
        """A document's tokens, marked as the trainer does; ``folder`` has the tokenizer.

        Raises:
            EzpzError: there is none.
        """
