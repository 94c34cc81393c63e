"""The experts of one layer in a kernel: their parameters, and how their rows are grouped.

Legend of the suffixes: :mod:`.contract`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ezpz_moe.compute.activations import Activation
from ezpz_moe.compute.biases import bias_columns
from ezpz_moe.compute.grouping import Grouping
from ezpz_moe.compute.learning import Learning, has_gradients, learning


class Read(NamedTuple):
    """Rows, and the operand that products read them as."""

    rows_RX: Tensor
    operand: Any


class Experts(NamedTuple):
    """The parameters of a layer, None for what it does not have, and how its rows are grouped.

    What is named ``ones`` is the :func:`.bias_columns` of ones, None without biases.

    Attributes:
        learns: whether any parameter has a gradient.
        learning: the rows of the experts that learn, if not all do.
    """

    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor | None
    b1_EF: Tensor | None
    b2_ED: Tensor | None
    b3_EF: Tensor | None
    activation: Activation
    groups: Grouping
    learns: bool = True
    learning: Learning | None = None

    def read(self, rows_RX: Tensor) -> Read:
        return Read(rows_RX, self.groups.operand(rows_RX))

    def columns(self, factor_R: Tensor, like: Tensor) -> Read | None:
        """Return what adds biases to a product, each row with its factor."""
        if self.b1_EF is None:
            return None
        return self.read(bias_columns(factor_R, like.dtype))

    def ones(self, rows_RX: Tensor) -> Read | None:
        return self.columns(rows_RX.new_ones(rows_RX.shape[0]), rows_RX)

    def weight_gradient(self, left: Read, right: Read, like_EMN: Tensor) -> Tensor:
        """Compute :meth:`.Grouping.weight_gradient`, with zeros for frozen experts."""
        if self.learning is None:
            return self.groups.weight_gradient(left.operand, right.operand, like_EMN)
        return self.learning.weight_gradient(left.rows_RX, right.rows_RX, like_EMN)

    def owned(self, *rows_RX: Tensor | None) -> list[Tensor | None]:
        """Return :meth:`.Grouping.owned` of each; None for None."""
        return [None if each is None else self.groups.owned(each) for each in rows_RX]


def learning_of(
    grouping: type[Grouping],
    trained_E: Tensor | None,
    counts_E: Tensor,
    rows_RX: Tensor,
    options: tuple[Any, ...],
) -> tuple[bool, Learning | None]:
    """Return whether a parameter has a gradient, and whose rows it is of if not of all experts."""
    if trained_E is None or not has_gradients(trained_E):
        return has_gradients(trained_E), None
    return True, learning(grouping, trained_E, counts_E, rows_RX, options)
