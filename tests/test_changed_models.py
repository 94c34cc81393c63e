"""A model of the host's with other sizes: every node agrees, and its values start as the host's."""

from pathlib import Path
from typing import Any

import pytest
from test_models import build, leaves

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.models import deepseek_v3, gpt_oss  # noqa: E402
from torchtitan.models.common.moe import MoE  # noqa: E402

from ezpz_moe.config.flavor_schema import Flavor  # noqa: E402
from ezpz_moe.hosts.counts import counts_at_hand  # noqa: E402
from ezpz_moe.hosts.titan.models import host_spec, model_spec, what_changes_nothing  # noqa: E402
from ezpz_moe.hosts.titan.parameters import summarize  # noqa: E402

DEEPSEEK_16B = """
n_layers = 27
vocab_size = 102400
dim = 2048
moe_hidden_dim = 1408
dense_hidden_dim = 10944
num_experts = 64
router_top_k = 6
"""
GPT_OSS_20B = """
n_layers = 24
vocab_size = 201088
dim = 2880
num_experts = 32
"""


def changed(folder: Path, base: str, change: str) -> Flavor:
    (folder / "mine.toml").write_text(f'base = "{base}"\n[change]\n{change}\n')
    return load_flavor("mine", near=folder)


@pytest.mark.parametrize(
    ("base", "change", "registry", "same"),
    [
        ("deepseek_v3/debugmodel", DEEPSEEK_16B, deepseek_v3, "16B"),
        ("gpt_oss/debugmodel", GPT_OSS_20B, gpt_oss, "20b"),
    ],
)
def test_a_small_model_of_the_hosts_becomes_its_large_one(
    base: str, change: str, registry: Any, same: str, tmp_path: Path
) -> None:
    """Node by node, with every initial value: of more layers, another width, more experts."""
    ours = dict(leaves(host_spec(changed(tmp_path, base, change)).model))
    assert ours == dict(leaves(registry.model_registry(same).model))


def test_a_large_model_becomes_the_small_one(tmp_path: Path) -> None:
    change = "n_layers=4\nvocab_size=2048\ndim=256\nnum_experts=8"
    ours = dict(leaves(host_spec(changed(tmp_path, "gpt_oss/20b", change)).model))
    assert ours == dict(leaves(gpt_oss.model_registry("debugmodel").model))
