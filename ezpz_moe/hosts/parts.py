"""Define the parts of a binding that a host may lack, and the host's own types.

Each is a Protocol. The module that defines a part's functions is the part: ``overrides.py`` beside
a host's class is its :class:`Overrides`, for example, and the class returns the module itself.
:class:`ezpz_moe.hosts.host.Host` has a method for each part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ezpz_moe.config.flavor_schema import ExpertPrecision, Routed
    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.hosts import accounting
    from ezpz_moe.hosts.model_sheet import ModelSheet
    from ezpz_moe.hosts.rank_report import RankReport

# --- the host's own types -----------------------------------------------------------------------


# Only what tools read by name; they get the rest from `Host.settings`.
class TrainerConfig(Protocol):
    """The config of a run; besides these sections it has whatever the host has."""

    training: Any
    parallelism: Any
    checkpoint: Any


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

    def for_checkpoints(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``factory`` for the host's checkpoint manager, and return it."""

    def selected(
        self,
        config: Any,
        backend: str,
        chosen_by: str,
        expert_precision: ExpertPrecision | None = None,
        routed: Routed = "one_node",
    ) -> Any:
        """Return the config of the same routed layer, with experts computed by ``backend``.

        Raises:
            EzpzError: unknown backend, or it cannot compute these experts.
        """

    def causal_attention(self, config: Any) -> Any:
        """Return the config of the SDPA kernel that replaces ``config.inner_attention``."""

    def our_checkpointer(self, config: Any) -> Any:
        """Return the config of the plugin's checkpoint manager, with the settings of ``config``."""

    def turn_off_cuda_graphs_for(self, backend: str) -> None:
        """Turn CUDA graphs off in the current run if ``backend`` copies to the host's memory."""

    def refuse_overrides_of_job(self) -> None:
        """Refuse overrides of the current run that exclude each other, or would do nothing.

        Raises:
            EzpzError: they do.
        """

    def enter_run(self, door: str) -> None:
        """Refuse a run that must not start, lock its folder, and let FSDP train it on the CPU.

        Raises:
            EzpzError: several CPU ranks would start with the same values, or another run writes
                into the folder.
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

    Arguments are those of :meth:`ezpz_moe.hosts.host.Host.run_rank`. Methods that report on a rank
    can be called once per process.
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


class Planning(Protocol):
    """Fills in what planning computes with."""

    def model_sheet(
        self, config: str, host_flags: list[str], *, is_cpu: bool = False, backend: str = ""
    ) -> ModelSheet:
        """Return the sheet of a job's model, after the trainer's own flags.

        Args:
            config: a flavor's name or the path of a job's TOML.
            host_flags: the trainer's own flags, which override the job.
            is_cpu: whether the run's ranks are CPUs like this one.
            backend: computes the experts in place of the job's own.

        Raises:
            EzpzError: the job is wrong, or has what is not planned.
        """


class Tokenizer(Protocol):
    """Turns text into tokens and back.

    Attributes:
        eos_id: the token that ends a text; None if the tokenizer names none.
        tokenizer: the one of the library ``tokenizers`` that it wraps.
    """

    eos_id: int | None
    tokenizer: Any

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        """Return the text's tokens, with the marks of its beginning and end that are asked for."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the tokens' text."""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        """Return a chat as one text. Raises ValueError if there is no template."""


class Analysis(Protocol):
    """Runs a flavor's model on a text. L = sequence length, V = vocabulary, K = experts per token.

    ``model`` is always what :meth:`build` has returned.
    """

    def longest(self, flavor: Flavor) -> int:
        """Return how many tokens a sequence may have."""

    def build(
        self, flavor: Flavor, length: int, *, device: str, one_document: bool = False
    ) -> nn.Module:
        """Build the model on ``device``, with the host's settings for sequences of ``length``.

        Args:
            one_document: whether every sequence is one document, without a mask between several.

        Raises:
            EzpzError: the host refuses the model or the length.
        """

    def forward(self, model: nn.Module, tokens_L: Tensor, positions_L: Tensor) -> Tensor:
        """Return the logits [L, V] of one sequence."""

    def routers(self, model: nn.Module) -> dict[str, Any]:
        """Return the router of each layer with experts, by layer name; it has ``num_experts``."""

    def chosen(self, output: Any) -> Tensor:
        """Return the experts in a router's output: [..., K]."""

    def weights(self, output: Any) -> Tensor:
        """Return the weights of the experts in a router's output: [..., K]."""

    def expert_weights(self, model: nn.Module) -> dict[str, list[Tensor]]:
        """Return the routed experts' parameters [E, ...], by layer name."""

    def at_step(self, model: nn.Module, step: int) -> None:
        """Set what the flavor schedules to its value at a training step."""

    def tokenizer(self, folder: str, flavor: Flavor) -> Tokenizer:
        """Return the host's tokenizer in ``folder``.

        Raises:
            EzpzError: ``folder`` has no tokenizer, or one with IDs that the model does not have.
        """

    def encoder(self, folder: str, flavor: Flavor) -> Callable[[str], list[int]]:
        """Return a function that encodes a document, with the marks that the trainer adds.

        Raises:
            EzpzError: ``folder`` has no tokenizer, or one with IDs that the model does not have.
        """
