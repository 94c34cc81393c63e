"""What excludes each other in a flavor's [router] and [balance], and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from flavor_files import load, said

BALANCED = '[router]\nrouting = "balanced"\n'
SINKHORN = '[router]\nrouting = "sinkhorn"\n'
RELU = '[router]\nrouting = "relu"\nactivation = "relu_rmsnorm"\n'


def no_effect_balanced(what: str) -> str:
    return (
        f'router.routing = "balanced" ignores the scores: {what} would have no effect. '
        'Remove it; if it is inherited, set a loss to 0 and bias_update to "none".'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{SINKHORN}[balance]\naux_loss = 0.01\nmse_loss = 0.1",
            'router.routing = "sinkhorn" excludes balance.aux_loss = 0.01 and balance.mse_loss = '
            "0.1: its assignment is doubly stochastic and thus balanced already. Remove the loss "
            '(set it to 0 if it is inherited), or route with "topk".',
        ),
        (
            f'{SINKHORN}[balance]\nbias_update = "sign"',
            'router.routing = "sinkhorn" chooses without the selection bias: balance.bias_update = '
            '"sign" would move it further and further, unchecked. Remove it; if it is inherited, '
            'set it to "none".',
        ),
        (
            f"{BALANCED}[balance]\naux_loss = 0.01",
            no_effect_balanced("balance.aux_loss = 0.01"),
        ),
        (
            f'{BALANCED}[balance]\nz_loss = 0.1\nbias_update = "sign"',
            no_effect_balanced('balance.z_loss = 0.1 and balance.bias_update = "sign"'),
        ),
        (
            f'{BALANCED}[balance]\nbias_update = "proportional"',
            no_effect_balanced('balance.bias_update = "proportional"'),
        ),
        (
            '[balance]\ndrop = "probability"\nmin_capacity = 4',
            '[balance] drop = "probability" and min_capacity = 4 have no effect without '
            "capacity_factor. Set it, or remove the rest; what is inherited can be set to "
            'drop = "last" and min_capacity = 1.',
        ),
        (
            f"{BALANCED}[balance.global]\nz_loss = 0.1",
            no_effect_balanced("balance.global.z_loss = 0.1"),
        ),
        (
            f"{SINKHORN}[balance.batch]\nz_loss = 0.1\nmse_loss = 1",
            'router.routing = "sinkhorn" excludes balance.batch.mse_loss = 1.0: its assignment is '
            "doubly stochastic and thus balanced already. Remove the loss (set it to 0 if it is "
            'inherited), or route with "topk".',
        ),
        (
            '[balance]\naux_loss = 0.01\nscope = "batch"\n[balance.batch]\nz_loss = 0.1',
            '[balance] aux_loss = 0.01 with scope = "batch", and batch.z_loss = 0.1: these are '
            "losses of one scope. Put all of them into [balance.batch]; if some are inherited, set "
            "those to 0.",
        ),
        (
            '[balance]\nscope = "batch"\n[balance.global]\nz_loss = 0.1',
            '[balance] scope = "batch" has no effect without a loss beside it, and global.z_loss = '
            '0.1 has its own. Remove it; if it is inherited, set scope = "sequence".',
        ),
        (
            '[balance]\nscope = "batch"\n[balance.global]\nz_loss = 0.1\naux_loss = 1',
            '[balance] scope = "batch" has no effect without a loss beside it, and global.aux_loss '
            "= 1.0 and global.z_loss = 0.1 have their own. Remove it; if it is inherited, set "
            'scope = "sequence".',
        ),
        (
            "[balance]\nbias_rate = 0.01",
            '[balance] bias_rate has no effect without bias_update = "sign" or "proportional"; set '
            'bias_update (models of torchtitan have "sign" by themselves), or remove bias_rate.',
        ),
        (
            "[router]\nnoise = 0.5",
            '[router] noise = 0.5 has no effect with routing = "topk", only with "balanced"; '
            "remove it, or if it is inherited set noise = 0.0 and skip_first_n_experts = 0.",
        ),
        (
            f"{BALANCED}sinkhorn_tolerance = 0.1\nsinkhorn_iterations = 5",
            "[router] sinkhorn_tolerance = 0.1 and sinkhorn_iterations = 5 have no effect with "
            'routing = "balanced", only with "sinkhorn"; remove it, or if it is inherited set '
            "sinkhorn_tolerance = 0.0001 and sinkhorn_iterations = 100.",
        ),
        (
            f"{BALANCED}jitter_noise = true",
            '[router] jitter_noise = 0.01 has no effect with routing = "balanced", which has its '
            "own noise; remove it, or if it is inherited set it to 0.",
        ),
        (
            f"{SINKHORN}null_experts = 1\nconstant_experts = 2",
            '[router] null_experts = 1 and constant_experts = 2 need routing = "topk", not '
            '"sinkhorn".',
        ),
        (
            f"{BALANCED}copy_experts = 1",
            '[router] copy_experts = 1 needs routing = "topk", not "balanced".',
        ),
        (
            "[router]\ntop_k = 6",
            "[router] top_k = 6 applies only with zero-computation experts; without them the "
            "model's own top-k holds (router_top_k).",
        ),
        (
            "[router]\ndispatch_padding = false",
            "[router] dispatch_padding = false needs pad_token_id, which says which tokens are "
            'padding, or padding = "labels".',
        ),
        (
            '[router]\npadding = "trailing"\ndispatch_padding = false',
            '[router] padding = "trailing" needs pad_token_id, which says which tokens are '
            "padding.",
        ),
        (
            'router_group_score = "max"',
            'router_group_score = "max" has no effect, as the experts are in no groups '
            "(router_num_expert_groups); remove it.",
        ),
        (
            "[router]\nnull_experts = 2\ntop_k = 11",
            "router.top_k = 11 exceeds the 10 available experts: 8 routed and 2 "
            "zero-computation ones.",
        ),
        (
            '[router]\nrouting = "relu"',
            '[router] routing = "relu" chooses the experts whose activation is not 0: set '
            'activation = "relu_rmsnorm", not "identity".',
        ),
        (
            '[router]\nactivation = "softplus"\nlearned_scale = true',
            '[router] learned_scale = true is the scale of activation = "relu_rmsnorm", not of '
            '"softplus"; set that activation, or remove it; if it is inherited, set it to false.',
        ),
        (
            f"{RELU}null_experts = 2",
            '[router] null_experts = 2 needs routing = "topk", not "relu".',
        ),
        (
            f"{RELU}[balance]\ncapacity_factor = 1.5",
            'router.routing = "relu" excludes balance.capacity_factor = 1.5: an expert\'s even '
            "share is one of a fixed number of choices, and tokens choose as many as they need. "
            'Remove it (set it to 0 if it is inherited), or route with "topk".',
        ),
        (
            f'{RELU}[balance]\nbias_update = "sign"',
            'router.routing = "relu" chooses without the selection bias: balance.bias_update = '
            '"sign" would move it further and further, unchecked. Remove it; if it is inherited, '
            'set it to "none".',
        ),
        (
            "[balance.batch]\nlocality_loss = 0.1",
            "balance.batch.locality_loss compares which logits are above 0, and only "
            'router.activation = "relu_rmsnorm" chooses by that. Set it, or remove the loss; if it '
            "is inherited, set it to 0.",
        ),
        (
            f"{SINKHORN}[balance]\nchunk_loss = 0.1",
            'router.routing = "sinkhorn" excludes balance.chunk_loss: its plan spreads the tokens '
            "over all experts, whatever their neighbours choose. Remove the loss (set it to 0 if "
            'it is inherited), or route with "topk" or "relu".',
        ),
        (
            f"{BALANCED}[balance]\nchunk_loss = 0.1",
            no_effect_balanced("balance.chunk_loss = 0.1"),
        ),
        (
            "[balance]\nchunk = 8",
            "[balance] chunk = 8 has no effect without chunk_loss. Set that, or remove it; if it "
            "is inherited, set chunk = 64.",
        ),
        (
            f"{BALANCED}skip_first_n_experts = 6",
            "router.skip_first_n_experts = 6 leaves 2 of 8 experts, but a token uses 3.",
        ),
        (
            f"{BALANCED}skip_first_n_experts = 9",
            "router.skip_first_n_experts = 9 leaves 0 of 8 experts, but a token uses 3.",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, text: str, message: str) -> None:
    assert said(tmp_path, text) == f"mine.toml: {message}"


def test_all_that_does_not_go_together_is_said_at_once(tmp_path: Path) -> None:
    message = said(tmp_path, "[router]\nnoise = 0.5\ntop_k = 5\ndispatch_padding = false")
    assert len(message.splitlines()) == 1
    for part in (
        "noise = 0.5 has no effect",
        "top_k = 5 applies only",
        "dispatch_padding = false needs",
    ):
        assert part in message


@pytest.mark.parametrize(
    "text",
    [
        '[router]\nrouting = "sinkhorn"\n[balance]\nz_loss = 0.1\nbias_update = "none"',
        '[router]\nrouting = "balanced"\n[balance]\nbias_update = "none"\naux_loss = 0',
        '[router]\nrouting = "sinkhorn"\njitter_noise = true',
        '[balance]\nbias_update = "none"\nbias_rate = 0.1',
        '[balance]\nbias_update = "sign"\nbias_rate = 0',
        '[balance]\nbias_update = "sign"\nbias_rate = { start = 0.1, end = 0, steps = 9 }',
        '[router]\npadding = "labels"\ndispatch_padding = false',
        '[router]\npadding = "labels"\npad_token_id = 1',
        "router_num_expert_groups = 8\nrouter_num_limited_groups = 4",
        'router_num_expert_groups = 4\nrouter_num_limited_groups = 2\nrouter_group_score = "max"',
        "[router]\nfreeze = true\n[balance]\naux_loss = 0.1",
        f'{RELU}learned_scale = true\n[balance]\nlocality_loss = 1\nbias_update = "none"',
        f"{RELU}jitter_noise = true\n[balance]\naux_loss = 0.1\nz_loss = 1\nmse_loss = 2",
        '[router]\nactivation = "relu_rmsnorm"\nlearned_scale = true\n[balance]\nlocality_loss = 1',
        "[balance]\nchunk = 8\n[balance.global]\nchunk_loss = 1",
    ],
)
def test_what_goes_together(tmp_path: Path, text: str) -> None:
    load(tmp_path, text)
