"""What a backend built from torch's products has to know: how to multiply rows grouped by expert.

:mod:`.ffn` computes the expert FFN and the routed layer with it, forward and backward. So a backend
of this kind is one subclass of :class:`Grouping` and nothing else.

Legend of the suffixes: :mod:`.contract`. M, N, K, L = dimensions of products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from torch import Tensor


class Grouping(ABC):
    """The rows of every expert, for one routing; made anew by every kernel.

    An *operand* is rows in the form in which a product reads them, made once for all products
    that read them. Rows that change afterwards need a new one.

    Products are computed in the dtype of their operands. Weights in another are cast where they are
    read, and their gradients are rounded to theirs: of no stack of weights there are two copies at
    once, and on a CPU not even one.

    Attributes:
        depends_on_number_of_rows: whether R says which rows count, not the counts alone.
    """

    depends_on_number_of_rows: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of_counts(cls, counts_E: Tensor, rows_RX: Tensor, *options: Any) -> Self:
        """Group by counts; ``rows_RX`` says how many rows there are, and where.

        A subclass names the backend's options, each annotated: torch reads an operator's schema
        from them.

        Raises:
            ValueError: counts that no R rows can have, where looking at them costs no device sync.
        """

    @classmethod
    @abstractmethod
    def of_offsets(cls, offs_E: Tensor, rows_RX: Tensor, *options: Any) -> Self:
        """Group by inclusive offsets, like :meth:`of_counts`."""

    def owned(self, rows_RX: Tensor) -> Tensor:
        """Return a view without tail rows if their number is known here, else all rows."""
        return rows_RX

    @abstractmethod
    def zero_tail_(self, rows_RX: Tensor) -> Tensor:
        """Set the rows that no expert owns to zero, in place, and return all rows."""

    @abstractmethod
    def operand(self, rows_RX: Tensor) -> Any:
        """Prepare rows for reading. Tail rows are never read: they may hold anything."""

    @abstractmethod
    def multiply(self, A: Any, B_EKN: Tensor, out_RN: Tensor | None = None) -> Tensor:
        """Compute ``A[r] @ B[expert of r]``; tail rows of the result may hold anything.

        Args:
            A: an operand of rows [R, K].
            B_EKN: one matrix per expert, any strides.
            out_RN: contiguous memory that the result may take; the caller uses only what is
                returned.
        """

    @abstractmethod
    def multiply_sum(
        self, A: Any, B_EKN: Tensor, A2: Any, B2_ELN: Tensor, out_RN: Tensor | None = None
    ) -> Tensor:
        """Compute ``A[r] @ B[expert of r] + A2[r] @ B2[expert of r]``, like :meth:`multiply`."""

    @abstractmethod
    def weight_gradient(self, left: Any, right: Any, like_EMN: Tensor) -> Tensor:
        """Compute ``left[rows].T @ right[rows]`` per expert, in layout and dtype of ``like_EMN``.

        An expert without rows gets zero, the sum over nothing.
        """
