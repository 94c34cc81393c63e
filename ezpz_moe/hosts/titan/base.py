"""What the modules of this folder ask of a generation: where generations differ.

They ask the host at hand, :func:`titan`. ``v0_3.py`` has the first answers, ``v2026_08.py`` and
``v2026_09.py`` those that differ.
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
    from ezpz_moe.config.flavor_schema import ExpertPrecision


@dataclass(frozen=True)
class Sequences:
    """The work counted in sequences: in a training step, and in a microbatch of one rank."""

    of_step: int
    of_microbatch: int
    length: int


class Sizes(NamedTuple):
    """The sizes of one layer's routed experts."""

    num_experts: int
    dim: int
    hidden_dim: int


class Experts(Protocol):
    """The module that gives a class of the host's experts the selector."""

    @property
    def HostExperts(self) -> Any:
        """The host's class whose config nodes get the selector."""

    @property
    def EzpzGroupedExperts(self) -> Any:
        """That class with the selector."""

    def sizes(self, config: Any) -> Sizes:
        """The experts' sizes, from such a node."""

    def selected(
        self,
        config: Any,
        backend: str,
        chosen_by: str,
        expert_precision: ExpertPrecision | None = None,
    ) -> Any:
        """The node of the same experts, computed by ``backend``.

        Raises:
            EzpzError: unknown backend, or these experts cannot be computed by it.
        """


class Titan(Host):
    """torchtitan since 0.3.

    Attributes:
        LENGTH: where the config says how many tokens a token may look back over.
        LONGEST: the name of that limit on the model's side: of a decoder, and of its RoPE.
        CUT_BY_LOSS: what the chunked loss cuts into equal parts.
        STEP: what all ranks compute between two steps of the optimizer; -1: as little as possible.
        MICROBATCH: what one rank computes at once, in the unit of ``STEP``.
    """

    LENGTH: ClassVar[str]
    LONGEST: ClassVar[str]
    CUT_BY_LOSS: ClassVar[str]
    STEP: ClassVar[str]
    MICROBATCH: ClassVar[str]

    @abstractmethod
    def microbatches(self, parallelism: Any) -> int:
        """The least number of ``MICROBATCH`` that a rank computes."""

    @abstractmethod
    def work(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields for the job's keys about the amount of work that are not fields of the host.

        Raises:
            EzpzError: the keys contradict each other.
        """

    @abstractmethod
    def one_sequence(self, length: int) -> tuple[int, ...]:
        """The shape of the tokens of one sequence."""

    @abstractmethod
    def sequences(self, training: Any, parallelism: Any, data_ranks: int) -> Sequences:
        """How the work of a training step is divided; ``data_ranks`` have data of their own."""

    @abstractmethod
    def fit_model(self, config: Any) -> None:
        """Give the model what only the whole config contains."""

    @abstractmethod
    def own_conflicts(self, config: Any) -> Iterator[str]:
        """Conflicts in a run's config that only this host has."""

    @abstractmethod
    def experts(self) -> Experts:
        """The experts with a selectable backend."""

    @abstractmethod
    def causal_attention(self, config: Any) -> Any:
        """The config of the SDPA kernel that stands in for ``config.inner_attention``."""

    @abstractmethod
    def dataloader_config(
        self,
        dataset: str | None,
        dataset_path: str | None,
        *,
        job_folder: Path | None,
        infinite: bool = True,
    ) -> Any:
        """The config of the dataloader for ``dataset`` and ``dataset_path``.

        Raises:
            EzpzError: as :func:`ezpz_moe.hosts.documents.find_text`.
        """


def titan() -> Titan:
    """The host at hand."""
    found = at_hand()
    assert isinstance(found, Titan)
    return found
