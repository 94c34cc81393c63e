"""A job that a flavor's router does not go with is refused, and one without [telemetry] reports."""

import dataclasses
import re

import pytest
import router_cases  # noqa: F401  (skips on torchtitan 0.2)
from dialect import SINCE_2026_08

from ezpz_moe.data import labelled
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.tools import doctor

EP = "[parallelism]\nexpert_parallel_degree = 2\n"
RELU = 'routing = "relu"\nactivation = "relu_rmsnorm"\n'
REFUSED = {
    "a score for the groups that the host's model has not": (
        'router_group_score = "max"',
        "",
        'router_group_score = "max" has no effect',
    ),
    "too few experts of the host's model": (
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
        "pad_token_id = 0 cannot be combined with parallelism.pipeline_parallel_degree = 2.*"
        "Set the degree to 1, or remove the key",
    ),
    "padding by labels and PP": (
        'padding = "labels"',
        "[parallelism]\npipeline_parallel_degree = 2",
        'padding = "labels" cannot be combined with parallelism.pipeline_parallel_degree = 2.*'
        "Set the degree to 1, or remove the key",
    ),
    "the end of a sequence that ranks share": (
        'padding = "trailing"\npad_token_id = 0',
        "[parallelism]\ncontext_parallel_degree = 2",
        'padding = "trailing" cannot be combined with parallelism.context_parallel_degree = 2',
    ),
    "distributed tensors with TP": (
        'routing = "balanced"',
        '[parallelism]\nspmd_backend = "partial_dtensor"\ntensor_parallel_degree = 2',
        "balanced. cannot be combined with .* 'partial_dtensor' and tensor parallelism",
    ),
    "averages and distributed tensors": (
        "similarity = { strength = 0.5 }",
        '[parallelism]\nspmd_backend = "partial_dtensor"\ntensor_parallel_degree = 2',
        "similarity.strength = 0.5 cannot be combined with .* and tensor parallelism, where a "
        'router\'s tensors are distributed. Set parallelism.spmd_backend to "spmd_types"',
    ),
    "averages over what another rank has": (
        "similarity = { strength = 0.5 }",
        "[parallelism]\ncontext_parallel_degree = 2",
        "similarity.strength = 0.5 cannot be combined with parallelism.context_parallel_degree = 2",
    ),
    "averages over what a rank of its group has": (
        "similarity = { strength = 0.5 }",
        f"{EP}tensor_parallel_degree = 2",
        "similarity.strength = 0.5 cannot be combined with parallelism.tensor_parallel_degree and "
        "expert_parallel_degree both above 1: .* does not see the tokens before",
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
    "fixed rows, by ReLU": (
        RELU,
        f'{EP}expert_parallel_comm_backend = "deepep"',
        r'\[router\] routing = "relu" cannot be combined with the dispatcher DeepEP',
    ),
    "capture, by ReLU": (
        RELU,
        "[training]\ndisable_cuda_graphs = false",
        "leaving assignments out copies a number to the host",
    ),
    "a forced choice, by ReLU": (
        RELU,
        "[debug]\nmoe_force_load_balance = true",
        'routing = "relu" cannot be combined with debug.moe_force_load_balance = true',
    ),
    "neighbours and CP": (
        "[balance]\nchunk_loss = 0.1",
        "[parallelism]\ncontext_parallel_degree = 2",
        "chunk_loss cannot be combined with parallelism.context_parallel_degree = 2: a "
        "token's neighbours are then on another rank. Set the degree to 1, or remove the loss",
    ),
    "neighbours, TP and EP": (
        f"{RELU}[balance.batch]\nlocality_loss = 0.1",
        f"{EP}tensor_parallel_degree = 2",
        "batch.locality_loss cannot be combined with parallelism.tensor_parallel_degree "
        "and expert_parallel_degree both above 1",
    ),
    "groups, by ReLU": (
        RELU,
        "",
        "routing = .relu. cannot be combined with router_num_expert_groups = 4: a token has every",
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
    more = GROUPS if case.startswith("groups") else ""
    # Of an upstream model the flavor itself does not know the sizes.
    of = 'base = "deepseek_v3/debugmodel"' if "host" in case else 'inherits = "debugmodel"'
    keys = keys if "router_" in keys else f"[router]\n{keys}"
    (tmp_path / "mine.toml").write_text(f"{of}\n{more}{keys}\n")
    job = tmp_path / "job.toml"
    job.write_text(f'[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n{of_job}\n')
    with pytest.raises(EzpzError, match=message) as refusal:
        host().trainer_config(find_job(str(job)))
    assert "mine_sdpa" in str(refusal.value)


def config_of(folder, tables, job=""):
    (folder / "mine.toml").write_text(f'inherits = "debugmodel"\n{tables}\n')
    text = f'[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n{job}\n'
    (folder / "job.toml").write_text(text)
    return host().trainer_config(find_job(str(folder / "job.toml")))


def test_padding_by_labels_needs_a_data_loader_of_ours(tmp_path):
    """Both the one of the training and the one of the validation are."""
    job = '[validation]\nenable = true\ndataset = "pydoc_topics"'
    config = config_of(tmp_path, '[router]\npadding = "labels"', job)
    for loader in (config.dataloader, config.validator.dataloader):
        assert type(loader)._owner.__name__.startswith("Ezpz")
    others = config_of(tmp_path, "").dataloader
    with pytest.raises(EzpzError, match=r"with the data loader .*ezpz_moe\.data\.labelled"):
        dataclasses.replace(config, dataloader=others, handed_over=False)
    dataclasses.replace(config, dataloader=labelled(others), handed_over=False)


REMARKS = {
    "": [],
    "[balance]\naux_loss = 0.01": [r"aux_loss = 0.01 balances beside .* 0.001 in every step"],
    "[balance]\nmse_loss = 1": ["mse_loss = 1 balances beside .* the loss alone$"],
    "[balance]\naux_loss = 1\n[balance.batch]\nmse_loss = 2": [
        "aux_loss = 1 and batch.mse_loss = 2 balance beside .* the losses alone$"
    ],
    "[balance]\naux_loss = 1\nmse_loss = 3\n[balance.batch]\nmse_loss = 2": [
        "aux_loss = 1, mse_loss = 3 and batch.mse_loss = 2 balance beside"
    ],
    "[balance]\nz_loss = 1": [],
    "[balance]\nchunk_loss = 1": [],
    "[router]\nfreeze = true\n[balance]\naux_loss = 0.01": [],
    "[router]\nkeep_top1_score = true": ["no effect, as a token has 3 experts"],
    '[balance]\naux_loss = 0.01\nbias_update = "sign"': [],
    '[balance]\naux_loss = 0.01\nbias_update = "none"': [],
    "[router]\npad_token_id = 0": ["pad_token_id = 0 is the tokenizer's BOS token"],
    "[router]\npad_token_id = 1": ["pad_token_id = 1 is the tokenizer's EOS token"],
    "[router]\npad_token_id = 7": [],
    '[router]\npad_token_id = 1\npadding = "trailing"': [],
    # A router of the host's own.
    "router_top_k = 1\nrouter_route_norm = true": ["weight is divided by itself"],
    "router_top_k = 1\nrouter_route_norm = true\n[router]\nkeep_top1_score = true": [],
    '[router]\nrouting = "balanced"\n[balance]\nbias_update = "none"': ["taken in turn"],
}


@pytest.mark.parametrize("tables", REMARKS)
def test_what_nobody_may_have_meant_is_remarked(tmp_path, tables):
    config = config_of(tmp_path, tables)
    remarks = host().remarks(config)
    assert len(remarks) == len(REMARKS[tables])
    for remark, expected in zip(remarks, REMARKS[tables], strict=True):
        assert re.match(f"flavor 'mine_sdpa': .*{expected}", remark)


def test_remarks_are_logged_at_the_start_and_noted_by_doctor(tmp_path, monkeypatch, caplog):
    config_of(tmp_path, "[balance]\naux_loss = 0.02")
    assert "balances beside" not in caplog.text
    found = doctor.job_findings(doctor.Asked(str(tmp_path / "job.toml")))
    (note,) = [each for each in found if "balances beside" in each.problem]
    assert note.is_note
    config = host().trainer_config(find_job(str(tmp_path / "job.toml")))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with caplog.at_level("WARNING"):
        for _ in range(2):  # as the host copies it
            dataclasses.replace(config)
    assert caplog.text.count("balances beside") == 1


@pytest.mark.parametrize("key", ["aux_loss = 0.1", "capacity_factor = 1.25"])
def test_losses_and_drops_are_reported_without_being_asked(tmp_path, key):
    (tmp_path / "mine.toml").write_text(f'inherits = "debugmodel"\n[balance]\n{key}\n')
    (tmp_path / "job.toml").write_text('[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa"\n')
    config = host().trainer_config(find_job(str(tmp_path / "job.toml")))
    assert config.metrics.telemetry.detail == "brief"
