"""The host's own dispatch and combination of tokens, the reference of ``ezpz-moe bench``."""

from typing import Any

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host


def stock_dispatcher(num_experts: int, top_k: int) -> Any:
    """Return what sorts a rank's tokens by expert, and adds up what the experts return.

    ``dispatch(x_TD, scores_TK, ids_TK, counts_E) -> (x_RD, counts_E, metadata)``, and
    ``combine(y_RD, metadata, x_TD) -> out_TD``.

    Raises:
        EzpzError: no host is installed, or it has no such part.
    """
    with host().importing():
        try:
            from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
        except ModuleNotFoundError as error:
            raise EzpzError(
                f"{host().name} dispatches and combines tokens inside of its MoE layer, and not in "
                f"parts that can be measured: install torchtitan 0.3 or newer, or measure "
                f"--layer experts"
            ) from error
        return LocalTokenDispatcher(
            LocalTokenDispatcher.Config(num_experts=num_experts, top_k=top_k)
        )
