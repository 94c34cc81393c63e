"""A job that a flavor's router does not go with is refused, and one without [telemetry] reports."""

import pytest
import router_cases  # noqa: F401  (skips on torchtitan 0.2)
from dialect import SINCE_2026_08

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.jobs import find_job

EP = "[parallelism]\nexpert_parallel_degree = 2\n"
REFUSED = {
    "too few experts": (
        'routing = "balanced"\nskip_first_n_experts = 6',
        "",
        "router.skip_first_n_experts = 6 leaves 2 of 8 experts, but a token uses 3",
    ),
    "fixed rows": (
        "null_experts = 2",
        f'{EP}expert_parallel_comm_backend = "minimal_async_ep"',
        'null_experts cannot be combined with the dispatcher MinimalAsyncEP.*to "standard"',
    ),
    "a fixed number of rows for padding too": (
        "pad_token_id = 0\ndispatch_padding = false",
        f'{EP}expert_parallel_comm_backend = "deepep"',
        "dispatch_padding cannot be combined with the dispatcher DeepEP",
    ),
    "capture of what is cut": (
        "copy_experts = 1",
        "[training]\ndisable_cuda_graphs = false",
        "leaving assignments out copies a number to the host",
    ),
    "capture of sinkhorn": (
        'routing = "sinkhorn"',
        "[training]\ndisable_cuda_graphs = false",
        'routing = "sinkhorn" copies a number to the host',
    ),
    "a fixed number of rows for a capacity": (
        "[balance]\ncapacity_factor = 1.25",
        f'{EP}expert_parallel_comm_backend = "deepep"',
        r"\[balance\] capacity_factor cannot be combined with the dispatcher DeepEP",
    ),
    "capture of a capacity": (
        "[balance]\ncapacity_factor = 1.25",
        "[training]\ndisable_cuda_graphs = false",
        r"\[balance\] capacity_factor: leaving assignments out copies a number to the host",
    ),
    "constants and TP": (
        "constant_experts = 2",
        "[parallelism]\ntensor_parallel_degree = 2",
        "constant_experts cannot be combined with parallelism.tensor_parallel_degree = 2",
    ),
    "padding that no text has": (
        "pad_token_id = 2048",
        "",
        "pad_token_id = 2048: the model knows only tokens below 2048",
    ),
    "padding and PP": (
        "pad_token_id = 0",
        "[parallelism]\npipeline_parallel_degree = 2",
        "pad_token_id = 0 cannot be combined with parallelism.pipeline_parallel_degree = 2",
    ),
    "padding, TP and EP": (
        "pad_token_id = 0",
        f"{EP}tensor_parallel_degree = 2",
        "pad_token_id = 0 cannot be combined with parallelism.tensor_parallel_degree and",
    ),
    "distributed tensors with TP": (
        'routing = "balanced"',
        '[parallelism]\nspmd_backend = "partial_dtensor"\ntensor_parallel_degree = 2',
        "balanced. cannot be combined with .* 'partial_dtensor' and tensor parallelism",
    ),
    "two that choose": (
        'routing = "sinkhorn"',
        "[debug]\nmoe_force_load_balance = true",
        "sinkhorn. cannot be combined with debug.moe_force_load_balance = true",
    ),
    "jitter that is drawn again": (
        "jitter_noise = true",
        '[activation_checkpoint]\nmode = "full"\npreserve_rng_state = false',
        "jitter_noise = 0.01 cannot be combined with "
        "activation_checkpoint.preserve_rng_state = false",
    ),
    "noise that a partitioner draws again": (
        'routing = "balanced"\nnoise = 0.5',
        '[activation_checkpoint]\nmode = "memory_budget"\n[compile]\nenable = true',
        'noise = 0.5 cannot be combined with activation_checkpoint.mode = "memory_budget".*'
        "another mode",
    ),
    "cadence": (
        "[telemetry]\nevery = 15",
        "[metrics]\nlog_freq = 10",
        r"\[telemetry\] every = 15 must be a multiple of metrics.log_freq = 10",
    ),
    "groups": (
        "null_experts = 8",
        "",
        "null_experts cannot be combined with router_num_expert_groups = 4",
    ),
}
if SINCE_2026_08:
    REFUSED |= {
        "sequences in parts": (
            "jitter_noise = true",
            f"{EP}tensor_parallel_degree = 2",
            r'\[balance\] scope = "sequence" cannot be combined with '
            "parallelism.tensor_parallel_degree",
        ),
    }
else:  # since August 2026 there is no "full_dtensor"
    REFUSED |= {
        "distributed tensors": (
            'routing = "sinkhorn"',
            '[parallelism]\nspmd_backend = "full_dtensor"',
            "sinkhorn. cannot be combined with parallelism.spmd_backend = 'full_dtensor', where",
        ),
    }
GROUPS = "router_num_expert_groups = 4\nrouter_num_limited_groups = 2\n"


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(tmp_path, case):
    keys, of_job, message = REFUSED[case]
    more = GROUPS if case == "groups" else ""
    # Of an upstream model the flavor itself does not know the sizes.
    of = 'base = "deepseek_v3/debugmodel"' if "few" in case else 'inherits = "debugmodel"'
    (tmp_path / "mine.toml").write_text(f"{of}\n{more}[router]\n{keys}\n")
    job = tmp_path / "job.toml"
    job.write_text(f'[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n{of_job}\n')
    with pytest.raises(EzpzError, match=message) as refusal:
        host().trainer_config(find_job(str(job)))
    assert "mine_sdpa" in str(refusal.value)


@pytest.mark.parametrize("key", ["aux_loss = 0.1", "capacity_factor = 1.25"])
def test_losses_and_drops_are_reported_without_being_asked(tmp_path, key):
    (tmp_path / "mine.toml").write_text(f'inherits = "debugmodel"\n[balance]\n{key}\n')
    (tmp_path / "job.toml").write_text('[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n')
    config = host().trainer_config(find_job(str(tmp_path / "job.toml")))
    assert config.metrics.telemetry.detail == "brief"
