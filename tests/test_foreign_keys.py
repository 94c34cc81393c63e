"""Hints for keys of other projects: the table, the sentence, and where a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ezpz_moe.config.flavor_mistakes import FLAVOR_KEYS, TABLES
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.foreign_keys import meaning, projects
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.titan.job_keys import KEYS

ROWS = [row for project in projects().values() for row in project.keys]


def test_every_row_names_a_key_that_there_is() -> None:
    ours = set(FLAVOR_KEYS) | {
        f"{table}.{key}" for table, data in TABLES.items() for key in data.model_fields
    }
    ours |= {f"job: {section}.{key}" for section, keys in KEYS.items() for key in keys}
    assert {row.ours for row in ROWS} - ours == {""}


def test_a_row_without_a_key_of_ours_says_what_to_do() -> None:
    assert all(row.note for row in ROWS if not row.ours)


def test_no_project_has_a_key_twice() -> None:
    for project in projects().values():
        keys = [row.key for row in project.keys]
        assert len(keys) == len(set(keys)), project.name


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        # The hint used to be router_score_func.
        ("router_aux_loss_coeff = 0.01", "router_aux_loss_coef is [balance] aux_loss here, times"),
        ("num_experts_per_tok = 2", "Hugging Face's num_experts_per_tok is router_top_k here"),
        ("n_group = 8", "Hugging Face's n_group is router_num_expert_groups here"),
        ("score_func = 1", "score_func is router_score_func here"),
        ("top_k = 2", "top_k is router_top_k here"),  # although [router] has such a key
        ("[moe_args]\nnum_experts = 8", "moe_args: its keys are a flavor's own, at the top"),
        ("score_before_experts = true", "score_before_experts is router_scores here"),
        ("moe-router-topk = 2", "Megatron-Core's moe_router_topk is router_top_k here"),
        (
            "lb_loss_weight = 0.01",
            "times 1 / n_layers; see docs/guides/moving.md, also for its scope.",
        ),
        ("[balance]\nmoe_z_loss_coeff = 1e-3", "moe_z_loss_coeff is [balance] z_loss here"),
        ("[balance]\nep_size = 8", "ep_size is [parallelism] expert_parallel_degree of the job"),
        # Keys of our own, in another place; and misspelt ones.
        ("aux_loss = 0.01", "unknown key 'aux_loss'. It belongs in [balance] or in [balance."),
        ("[router]\nnum_experts = 8", "It belongs at the top of the file or in [change]."),
        ("[router]\nscope = 'batch'", "It belongs in [balance]."),
        ("[balance]\naux_los = 1.0", "Did you mean 'aux_loss'?"),
        ("router_topk = 2", "Did you mean 'router_top_k'?"),
    ],
)
def test_an_unknown_key_of_a_flavor(lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'inherits = "debugmodel"\n{lines}\n')
    with pytest.raises(EzpzError) as error:
        load_flavor("mine", near=tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("[training]\nmoe_aux_loss_coeff = 0.01", "moe_aux_loss_coeff is [balance] aux_loss here"),
        ("[moe_args]\ntop_k = 2", "[moe_args]: unknown section. torchtitan 0.2's moe_args: its"),
        ("[training]\ndump_folder = 'x'", "unknown key. It belongs in [job]."),
    ],
)
def test_an_unknown_key_of_a_job(lines: str, said: str, job_file) -> None:
    path = job_file(f'[model]\nname = "ezpz_moe"\nflavor = "debugmodel"\n{lines}\n')
    with pytest.raises(EzpzError) as error:
        load_job(path)
    assert said in str(error.value)


def test_what_two_projects_mean_by_a_key_is_said_once_each() -> None:
    assert meaning("hidden_size", []) == (
        " Megatron-Core's hidden_size is dim here; OLMo-core's hidden_size is moe_hidden_dim here; "
        "see docs/guides/moving.md."
    )
    assert meaning("norm_topk_prob", []).count("norm_topk_prob") == 1


def test_a_name_like_nothing_says_nothing() -> None:
    assert meaning("zzzzzz", ["aux_loss"]) == ""
