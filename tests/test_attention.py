"""Causal attention in place of FlexAttention and varlen attention: the same numbers as SDPA.

Legend: B = batch, L = sequence length, N = heads, H = head dimension.
"""

import pytest
import torch
import torch.nn.functional as F

from ezpz_moe.hosts.detect import check_host

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.models import gpt_oss, qwen3  # noqa: E402
from torchtitan.models.common.attention import (  # noqa: E402
    BaseAttention,
    ScaledDotProductAttention,
)

from ezpz_moe.hosts.titan.attention import CausalAttention, use_sdpa  # noqa: E402

B, L, N, H, KV_HEADS = 2, 17, 4, 8, 2
SCALE = 0.3


def inputs(kv_heads: int = N, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, L, heads, H, generator=generator).to(dtype).requires_grad_()
        for heads in (N, kv_heads, kv_heads)
    ]


def attend(left_window: int, qkv, **options):
    """(output, log-sum-exp) of the written-out form."""
    results = []

    def keep(out_BLNH, lse_BLN):
        results.append(lse_BLN)
        return out_BLNH

    module = CausalAttention.Config(left_window=left_window).build()
    return module(*qkv, scale=SCALE, out_transform=keep, **options), results[0]


def sdpa(qkv, mask=None):
    q, k, v = (each.transpose(1, 2) for each in qkv)
    out = F.scaled_dot_product_attention(
        q, k, v, scale=SCALE, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [N, KV_HEADS])
@pytest.mark.parametrize("left_window", [-1, 0, 3])
def test_output_and_gradients_equal_sdpas(kv_heads, left_window):
    mask = None
    if left_window >= 0:
        distance = torch.arange(L).unsqueeze(1) - torch.arange(L)
        mask = (distance >= 0) & (distance <= left_window)
    ours, theirs = inputs(kv_heads), inputs(kv_heads)
    out, _ = attend(left_window, ours, enable_gqa=kv_heads != N)
    expected = sdpa(theirs, mask)
    torch.testing.assert_close(out, expected)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(gradient)
    expected.backward(gradient)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_log_sum_exp_is_that_of_the_scores():
    qkv = inputs()
    _, lse_BLN = attend(-1, qkv)
    q, k = (each.detach().double() for each in qkv[:2])
    scores = torch.einsum("blnh,bsnh->blns", q, k) * SCALE
    later = torch.ones(L, L, dtype=torch.bool).triu(1).unsqueeze(1)
    expected = torch.logsumexp(scores.masked_fill(later, float("-inf")), dim=-1)
    torch.testing.assert_close(lse_BLN.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_a_transform_it_is_the_hosts_class():
    qkv = inputs(dtype=torch.bfloat16)
    ours = CausalAttention.Config().build()(*qkv, scale=SCALE)
    host = ScaledDotProductAttention.Config().build()(*qkv, scale=SCALE)
    assert torch.equal(ours, host)


@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_gpt_oss_keeps_its_windows(kernel):
    """A window of 128 is the token itself and 127 before it; every other layer has one."""
    model = gpt_oss.model_registry("debugmodel", attn_backend=kernel).model
    assert use_sdpa(model) == len(model.layers)
    windows = [layer.attention.inner_attention.left_window for layer in model.layers]
    assert windows == [127, -1, 127, -1]


def test_every_attention_is_replaced_once():
    model = qwen3.model_registry("debugmodel_moe").model
    assert use_sdpa(model) == len(list(model.traverse(BaseAttention.Config))) > 0
    assert use_sdpa(model) == 0
