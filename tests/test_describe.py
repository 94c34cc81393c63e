"""``ezpz-moe describe``: the table and the JSON say the same, and mistakes are said in a line."""

import json
import logging

import pytest

from ezpz_moe import cli
from ezpz_moe.config.flavors import flavor_names, load_flavor
from ezpz_moe.errors import DEBUG_VARIABLE
from ezpz_moe.hosts.accounting import BACKWARD
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(host()) is not Titan03:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "0")
    monkeypatch.setattr(logging.getLogger(), "level", logging.getLogger().level)


def test_the_table_and_the_json_say_the_same(capsys) -> None:
    flags = ["--training.seq-len", "256"]
    assert cli.main(["describe", "gpt_oss_debugmodel", *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seq_len"] == 256
    for figure, total in told["total"].items():
        assert total == sum(each[figure] for each in told["components"].values())
    assert told["total"]["flops_backward"] == BACKWARD * told["total"]["flops_forward"]
    assert (told["world_size"], told["memory"]) == (None, [])

    assert cli.main(["describe", "gpt_oss_debugmodel", *flags]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 layers, 4 of them with 8 experts; a token uses 4." in said
    assert f"total {told['total']['parameters'] / 1e6:.1f} M" in said
    assert f"{told['total']['flops'] / 1e6:.2f} M 100.0%" in said
    assert f"hidden size {told['dense_model_of_equal_flops']['ffn_hidden_dim']} " in said
    assert "Memory" not in said


@pytest.mark.parametrize(
    "name",
    [n if n.endswith("_like") else pytest.param(n, marks=pytest.mark.full) for n in flavor_names()],
)
def test_every_shipped_flavor_is_described(name: str, capsys) -> None:
    """With the parameters that the list of flavors has."""
    assert cli.main(["describe", name, "--json"]) == 0
    counted = counts_at_hand(load_flavor(name))
    assert counted is not None
    total = json.loads(capsys.readouterr().out)["total"]
    assert total["parameters"] == counted.total
    assert total["active_parameters"] == counted.active


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["16C"], "unknown flavor '16C'"),
        (["16B", "--world-size", "0"], "--world-size 0: a run needs at least 1 rank."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["describe", *arguments])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (2, "")
    assert said.err.startswith("ezpz-moe: error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
