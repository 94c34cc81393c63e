"""torchtitan since September 2026, where routed experts hold their projections themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ezpz_moe.hosts.reliance import Reliance
from ezpz_moe.hosts.titan.base import Experts
from ezpz_moe.hosts.titan.v2026_08 import Titan2026_08

if TYPE_CHECKING:
    from torch import Tensor, nn


class Titan2026_09(Titan2026_08):
    """torchtitan since September 2026."""

    generation = "2026_09"
    name = "torchtitan since September 2026"
    evidence = Reliance(
        "torchtitan.models.common.linear:GroupedLinear",
        # A class that older hosts lack; the version says nothing about a snapshot.
        used_for="recognizing the host's generation",
        if_broken="this is torchtitan of August 2026 or older",
        vital=True,
    )
    # August kept the names of 0.3.
    checkpoint_names = "2026_09"

    @property
    def relied_on(self) -> tuple[Reliance, ...]:
        from ezpz_moe.hosts.titan.relied_on_2026_09 import RELIED_ON

        return RELIED_ON

    @property
    def state_dict_keys(self) -> tuple[str, ...]:
        from ezpz_moe.hosts.titan.relied_on_2026_09 import STATE_DICT_KEYS

        return STATE_DICT_KEYS

    def stock_experts(self) -> Callable[[Tensor, Tensor, Tensor], nn.Module]:
        with self.importing():
            from ezpz_moe.hosts.titan.stock_2026_09 import stock_experts
        return stock_experts

    def experts(self) -> Experts:
        with self.importing():
            from ezpz_moe.hosts.titan import experts_2026_09
        return experts_2026_09
