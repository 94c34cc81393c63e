"""Declare what the modules of this folder ask of a generation: everything that differs.

They ask the current host, :func:`titan`. ``v0_3.py`` has the first answers. ``v2026_08.py`` and
``v2026_09.py`` have those that differ.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from ezpz_moe.hosts.at_hand import at_hand
from ezpz_moe.hosts.host import Host

if TYPE_CHECKING:
    from ezpz_moe.config.flavor_schema import Activation, ExpertPrecision, Routed


@dataclass(frozen=True)
class Sequences:
    """Work counted in sequences: in a training step, and in a microbatch of one rank."""

    of_step: int
    of_microbatch: int
    length: int


class Sizes(NamedTuple):
    """Sizes of one layer's routed experts."""

    num_experts: int
    dim: int
    hidden_dim: int


class Experts(Protocol):
    """The module that adds the selector to the host's class of experts."""

    @property
    def HostExperts(self) -> Any:
        """The host's class whose config nodes get the selector."""

    @property
    def HostLayer(self) -> Any:
        """The host's class of a routed layer, whose config nodes are replaced."""

    @property
    def EzpzGroupedExperts(self) -> Any:
        """``HostExperts`` with the selector."""

    def sizes(self, config: Any) -> Sizes:
        """Return the experts' sizes from such a config node."""

    def resize(
        self,
        config: Any,
        *,
        num_experts: int | None = None,
        dim: int | None = None,
        hidden_dim: int | None = None,
    ) -> None:
        """Give such a node other sizes, in place; None keeps one."""

    def initial_values(self, config: Any) -> tuple[Any, Any, Any] | None:
        """Return what such a node draws gate, down and up of its experts with.

        None for experts of another kind.
        """

    def selected(
        self,
        config: Any,
        backend: str,
        chosen_by: str,
        expert_precision: ExpertPrecision | None = None,
        why_composed: str | None = None,
    ) -> Any:
        """Return the node of the same experts, computed by ``backend``; their layer is the host's.

        Raises:
            EzpzError: unknown backend, or it cannot compute these experts.
        """

    def selected_layer(
        self,
        config: Any,
        backend: str,
        chosen_by: str,
        expert_precision: ExpertPrecision | None = None,
        routed: Routed = "one_node",
    ) -> Any:
        """Return the node of the same routed layer, with experts computed by ``backend``.

        Raises:
            EzpzError: unknown backend, or it cannot compute these experts.
        """

    def computing(self, config: Any, activation: Activation, has_biases: bool, where: str) -> Any:
        """Return the node of the same experts with another activation, or with biases.

        Raises:
            EzpzError: the host's experts compute another FFN than SwiGLU.
        """


class Titan(Host):
    """torchtitan since 0.3.

    Attributes:
        LENGTH: path in the config of how many tokens a token may look back over.
        LONGEST: name of that limit in the model, both in a decoder and in its RoPE.
        CUT_BY_LOSS: path of what the chunked loss cuts into equal parts.
        STEP: path of what all ranks compute between two optimizer steps; -1 means as little as
            possible.
        MICROBATCH: path of what one rank computes at once, in the unit of ``STEP``.
    """

    # Paths and not values, because messages have to name the setting that is wrong.
    LENGTH: ClassVar[str]
    LONGEST: ClassVar[str]
    CUT_BY_LOSS: ClassVar[str]
    STEP: ClassVar[str]
    MICROBATCH: ClassVar[str]

    @abstractmethod
    def microbatches(self, parallelism: Any) -> int:
        """Return the least number of ``MICROBATCH`` that a rank computes."""

    @abstractmethod
    def work(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields for the job's keys about the amount of work that the host has no field for.

        Raises:
            EzpzError: the keys contradict each other.
        """

    @abstractmethod
    def one_sequence(self, length: int) -> tuple[int, ...]:
        """Return the shape of the tokens of one sequence."""

    @abstractmethod
    def sequences(self, training: Any, parallelism: Any, data_ranks: int) -> Sequences:
        """Return how a training step is divided; ``data_ranks`` ranks have data of their own."""

    @abstractmethod
    def fit_model(self, config: Any) -> None:
        """Give the model what only the whole config contains."""

    @abstractmethod
    def own_conflicts(self, config: Any) -> Iterator[str]:
        """Yield conflicts in a run's config that only this host has."""

    @abstractmethod
    def experts(self) -> Experts:
        """Return the experts with a selectable backend."""

    @abstractmethod
    def causal_attention(self, config: Any) -> Any:
        """Return the config of the SDPA kernel that replaces ``config.inner_attention``."""

    @abstractmethod
    def validation_batches(self, validator: Any) -> tuple[dict[str, Any], int]:
        """Return what a validator tells its dataloader about batches, and how many make a step."""

    @abstractmethod
    def dataloader_config(
        self,
        dataset: str | None,
        dataset_path: str | None,
        *,
        job_folder: Path | None,
        infinite: bool = True,
    ) -> Any:
        """Return the config of the dataloader for ``dataset`` and ``dataset_path``.

        Raises:
            EzpzError: as :func:`ezpz_moe.hosts.documents.find_text`.
        """


def titan() -> Titan:
    """Return the current host."""
    found = at_hand()
    # Only the methods of these hosts import the modules of this folder.
    assert isinstance(found, Titan)
    return found
