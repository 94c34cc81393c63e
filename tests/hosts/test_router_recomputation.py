"""A block that is computed again in backward routes as the first time, and counts once."""

import pytest
import torch
from router_cases import B, L, flat, router_of, tokens
from torchtitan.distributed.activation_checkpoint import FullAC

from ezpz_moe.hosts.titan.activation_checkpointing import keeping_choices


class _Recomputed(torch.nn.Module):
    """A router behind an input that is another one when it is computed again."""

    def __init__(self, router):
        super().__init__()
        self.router, self.passes, self.ids = router, 0, []

    def forward(self, x_BLD):
        self.passes += 1
        weights, ids, _ = self.router(x_BLD * (1 if self.passes == 1 else -1))
        self.ids.append(ids)
        return weights


@pytest.mark.parametrize(("kept", "same"), [(True, True), (False, False)])
def test_recomputation_chooses_as_the_first_pass_did(model_with, kept, same):
    """Even when every score has changed; the host's own policy chooses anew."""
    router = router_of(model_with("[balance]\naux_loss = 0.1"))
    policy = FullAC.Config()
    policy = (keeping_choices(policy) if kept else policy).build()
    block = _Recomputed(router)
    weights = policy._wrap_block(block)(flat(tokens(router.gate.in_features)))
    weights.sum().backward()
    first, second = block.ids
    assert torch.equal(first, second) is same
    assert router.counts_E.sum() == B * L * 3
