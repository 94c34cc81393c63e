"""The model to make smaller: its checkpoint, and what it cannot become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.checkpoints import contents
from ezpz_moe.tools.checkpoints.expert_rows import ExpertRows, expert_rows, is_stack
from ezpz_moe.tools.checkpoints.tensors import read_whole


@dataclass(frozen=True)
class Whole:
    """The model to make smaller.

    Attributes:
        folder: of its checkpoint.
        metadata: the checkpoint's.
        flavor: its flavor.
        sizes: of the model's tensors, by name.
        rows: where these count experts.
        routers: the host's, without values, by layer.
    """

    folder: Path
    metadata: Metadata
    flavor: Flavor
    sizes: Mapping[str, torch.Size]
    rows: ExpertRows
    routers: Mapping[str, Any]

    @property
    def itemsize(self) -> int:
        """Bytes of its widest number type."""
        of = dict(contents.model_tensors(self.metadata)).values()
        return max(each.properties.dtype.itemsize for each in of)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        return read_whole(self.folder, self.metadata, name)

    def stacks(self, layer: str) -> list[str]:
        """Return the names of the tensors with a row for each routed expert of a layer."""
        return [name for name in self.sizes if is_stack(name) and self._is_of(name, layer)]

    def _is_of(self, name: str, layer: str) -> bool:
        return any(place.layer == layer for place in self.rows.dims[name])


def open_whole(folder: Path, flavor: Flavor) -> Whole:
    """Read what a checkpoint holds, and compare it with its flavor's model.

    Raises:
        EzpzError: it is incomplete, of another generation or model, or has tensors that may belong
            to experts in a way that is not known.
    """
    model = host().build_on_meta(flavor)
    metadata = contents.metadata_of_model(folder, host().checkpoint_names, model.state_dict())
    sizes = {name: entry.size for name, entry in contents.model_tensors(metadata)}
    return Whole(
        folder, metadata, flavor, sizes, expert_rows(sizes), host().analysis().routers(model)
    )


def check(whole: Whole, keep: int, *, as_constant: bool = False) -> None:
    """Refuse a number of experts that the model cannot have, before anything is computed.

    Raises:
        EzpzError: says why.
    """
    if as_constant:
        _check_constants(whole)
    flavor, most = whole.flavor, min(whole.rows.num_experts.values())
    if keep > most or keep >= max(whole.rows.num_experts.values()):
        raise EzpzError(
            f"--keep {keep}: a layer of flavor {flavor.name} has {most} experts. Keep fewer."
        )
    for router in whole.routers.values():
        limits_tokens = not flavor.router.has_unchosen and not flavor.router.leaves_out
        if limits_tokens and router.top_k > keep:
            raise EzpzError(
                f"--keep {keep}: a token of flavor {flavor.name} uses {router.top_k} experts. "
                "Keep at least as many."
            )
        groups, limited = router.num_expert_groups, router.num_limited_groups
        if groups is None:
            continue
        if keep % groups:
            raise EzpzError(
                f"--keep {keep}: flavor {flavor.name} has its experts in {groups} groups of equal "
                f"size (router_num_expert_groups). Keep a multiple of {groups}."
            )
        if limits_tokens and router.top_k > limited * (keep // groups):
            raise EzpzError(
                f"--keep {keep}: a token of flavor {flavor.name} uses {router.top_k} experts of "
                f"{limited} groups, which would have {limited * (keep // groups)}. Keep more."
            )


def _check_constants(whole: Whole) -> None:
    """Refuse a model in which constant experts cannot stand for others."""
    flavor, experts = whole.flavor, set(whole.rows.num_experts.values())
    reasons = {
        "its layers have different numbers of experts, and [router] constant_experts is one": (
            len(experts) > 1
        ),
        "a zero-computation expert is in no group (router_num_expert_groups)": any(
            router.num_expert_groups for router in whole.routers.values()
        ),
        'scores multiply the inputs of its experts (router_scores = "before")': (
            flavor.router_scores == "before"
        ),
        f'it has routing = "{flavor.router.routing}"': flavor.router.routing != "topk",
        "its experts work in a latent (moe_latent_dim)": flavor.moe_latent_dim is not None,
        "its experts have an FFN of their own": not any("w1_EFD" in name for name in whole.sizes),
    }
    if found := next((reason for reason, holds in reasons.items() if holds), None):
        raise EzpzError(f"--as-constant: not with flavor {flavor.name}: {found}. Leave it out.")
