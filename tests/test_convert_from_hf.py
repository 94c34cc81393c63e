"""``ezpz-moe convert --from``: configs of other projects become flavors with our units."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from convert_from_cases import GPT_OSS, KIMI_K2, MIXTRAL, QWEN3, V2, V2_LITE, flavor, hf
from test_hf_config import DEEPSEEK_V3

from ezpz_moe import cli
from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools import convert_foreign
from ezpz_moe.tools.convert_foreign import write

pytestmark = pytest.mark.skipif(
    type(presumed_host()) is not Titan03, reason="compares with models of torchtitan 0.3"
)

# Hugging Face -------------------------------------------------------------------------------------


def test_deepseek_v3_is_the_hosts_671b(tmp_path: Path) -> None:
    conversion = hf(tmp_path, DEEPSEEK_V3)
    found, shipped = flavor(tmp_path, conversion), load_flavor("671B")
    assert conversion.differences == ()
    assert found.dimensions is not None
    rope = found.dimensions.rope.model_copy(update={"max_seq_len": 16384})
    assert found.dimensions.model_copy(update={"vocab_size": 256128, "rope": rope}) == (
        shipped.dimensions
    )
    assert (found.balance.aux_loss, found.balance.bias_update) == (0, "sign")
    # The published model also predicts one token more.
    assert conversion.dropped == ["num_nextn_predict_layers"]


def test_the_loss_of_deepseek_v2_is_ours_by_sequence(tmp_path: Path) -> None:
    conversion = hf(tmp_path, V2_LITE)
    balance = flavor(tmp_path, conversion).balance
    assert (balance.aux_loss, balance.scope, balance.bias_update) == (0.001, "sequence", "none")
    assert (conversion.differences, conversion.dropped) == ((), [])
    by_batch = flavor(tmp_path, hf(tmp_path, V2_LITE | {"seq_aux": False})).balance
    assert by_batch.scope == "batch"


def test_kimi_k2_is_a_deepseek_v3_without_groups(tmp_path: Path) -> None:
    conversion = hf(tmp_path, KIMI_K2)
    found = flavor(tmp_path, conversion)
    assert (conversion.differences, conversion.dropped) == ((), [])
    assert found.dimensions is not None
    assert found.dimensions.router_num_expert_groups is None
    assert (found.dimensions.router_route_scale, found.dimensions.rope.theta) == (2.827, 5e4)
    assert (found.balance.aux_loss, found.balance.bias_update) == (0.001, "sign")


@pytest.mark.parametrize(
    ("method", "groups", "score"),
    [
        ("group_limited_greedy", (8, 3), "max"),
        ("greedy", (None, None), "top2_sum"),
        (None, (None, None), "top2_sum"),
    ],
)
def test_the_groups_of_deepseek_v2_are_ranked_by_their_best_expert(
    method, groups, score, tmp_path
) -> None:
    """Its class has groups with one method alone, and that is not its default."""
    config = {key: value for key, value in V2.items() if key != "topk_method"}
    conversion = hf(tmp_path, config | ({"topk_method": method} if method else {}))
    found = flavor(tmp_path, conversion)
    assert (conversion.differences, conversion.dropped) == ((), [])
    assert found.dimensions is not None
    assert groups == (
        found.dimensions.router_num_expert_groups,
        found.dimensions.router_num_limited_groups,
    )
    assert found.router_group_score == score
    (said,) = (each for each in conversion.changes if each.key == "n_group")
    assert (said.value, said.fate) == (8, "kept" if groups[0] else "needless")
    notes = [each.note for each in conversion.changes if each.key == "topk_method"]
    assert any('router_group_score = "max"' in each for each in notes) == (score == "max")


def test_the_flavor_in_the_documents_routes_as_deepseek_v2(tmp_path: Path) -> None:
    document = Path(__file__).parent.parent / "docs" / "reference" / "flavors.md"
    (text,) = re.findall(r"```toml\n(# deepseek_v2.toml\n.*?)```", document.read_text(), re.DOTALL)
    (tmp_path / "deepseek_v2.toml").write_text(text)
    found, theirs = (
        load_flavor("deepseek_v2", near=tmp_path),
        flavor(tmp_path, hf(tmp_path, V2)),
    )
    assert (found.router_group_score, found.balance) == (theirs.router_group_score, theirs.balance)
    assert found.dimensions is not None
    assert theirs.dimensions is not None
    for key in type(found.dimensions).model_fields:
        if key.startswith(("router_", "num_")):
            assert getattr(found.dimensions, key) == getattr(theirs.dimensions, key), key


def test_what_differs_is_said_in_the_file(tmp_path: Path) -> None:
    conversion = hf(tmp_path, V2 | {"norm_topk_prob": True})
    assert "# differs: its router normalizes the weights of softmax" in conversion.text
    assert len(conversion.differences) == 1


@pytest.mark.parametrize(
    ("config", "base", "aux_loss", "factor"),
    [
        (QWEN3, "qwen3/30B-A3B", 0.001 * 8 / 48, "top-k / MoE layers = 8 / 48"),
        (GPT_OSS, "gpt_oss/20b", 0.9 * 4 / 24, "top-k / MoE layers = 4 / 24"),
    ],
)
def test_transformers_loss_is_in_our_units(config, base, aux_loss, factor, tmp_path) -> None:
    conversion = hf(tmp_path, config | {"output_router_logits": True})
    found = flavor(tmp_path, conversion)
    assert found.base == base
    assert found.balance.aux_loss == pytest.approx(aux_loss, rel=1e-15)
    assert (found.balance.scope, found.balance.bias_update) == ("batch", "none")
    (line,) = (line for line in conversion.text.splitlines() if line.startswith("aux_loss"))
    assert line.endswith(factor)


@pytest.mark.parametrize("said", [{}, {"output_router_logits": False}])
def test_a_loss_that_transformers_does_not_add_is_commented_out(said, tmp_path) -> None:
    config = {key: value for key, value in QWEN3.items() if key != "output_router_logits"}
    conversion = hf(tmp_path, config | said | {"router_z_loss_coef": 0.001})
    assert not flavor(tmp_path, conversion).balance.has_losses
    assert "# aux_loss = 0.00016666666666666666 # router_aux_loss_coef" in conversion.text
    assert "8 / 48; off: transformers adds it only with output_rout" in conversion.text
    assert "# z_loss = 0.001 # router_z_loss_coef; off: " in conversion.text
    assert '# scope = "batch"' in conversion.text
    (loss,) = (each for each in conversion.changes if each.key == "router_aux_loss_coef")
    assert "[balance] aux_loss = 0.00016666666666666666, commented out (" in loss.note


def test_of_two_coefficients_of_one_loss_the_file_must_choose(tmp_path: Path) -> None:
    both = V2_LITE | {"router_aux_loss_coef": 0.001}
    assert flavor(tmp_path, hf(tmp_path, both)).balance.aux_loss == 0.001
    with pytest.raises(EzpzError, match="are both the balance loss, in other units"):
        hf(tmp_path, both | {"output_router_logits": True})


def test_the_page_shows_what_is_written(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent / "docs" / "guides" / "moving.md"
    assert hf(tmp_path, QWEN3).text in page.read_text()


def test_the_default_configs_of_transformers_have_no_unknown_key(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for config in ({**V2_LITE}, {"model_type": "deepseek_v3"}, QWEN3, {"model_type": "gpt_oss"}):
        whole = AutoConfig.for_model(**config).to_dict()
        conversion = hf(tmp_path, whole)
        unknown = [each.key for each in conversion.changes if "does not know" in each.note]
        assert not unknown, config["model_type"]
    assert 'base = "gpt_oss/120b"' in conversion.text  # the defaults of its class


def test_a_model_that_torchtitan_does_not_have(tmp_path: Path, capsys) -> None:
    conversion = hf(tmp_path, MIXTRAL)
    assert "torchtitan has no model like 'mixtral'" in conversion.refusal
    # Its loss in our units is still in the report.
    (loss,) = (each for each in conversion.changes if each.key == "router_aux_loss_coef")
    assert "[balance] aux_loss = 0.00125 " in loss.note
    with pytest.raises(EzpzError, match="was not written: torchtitan has no model like"):
        write(conversion, tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 64}, "the nearest, qwen3/30B-A3B, differs: num_experts is 64"),
        ({"model_type": 3}, "no model like 3"),
        ({"model_type": "qwen3_next"}, "no model like 'qwen3_next'"),
    ],
)
def test_a_size_that_torchtitan_does_not_have(change, said, tmp_path) -> None:
    assert said in hf(tmp_path, QWEN3 | change).refusal


def test_what_a_flavor_cannot_have_is_dropped(tmp_path: Path) -> None:
    changed = V2_LITE | {"moe_layer_freq": 2, "attention_dropout": 0.1, "my_router_trick": 3}
    assert set(hf(tmp_path, changed).dropped) == {
        "moe_layer_freq",
        "my_router_trick",
        "attention_dropout",
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([1], "is not a config"),
        ({"hidden_size": 8}, "is not a config of Hugging Face"),
        (V2_LITE | {"kv_lora_rank": None}, "config.json: lacks kv_lora_rank."),
        (V2_LITE | {"hidden_size": "wide"}, "config.json: dim = 'wide': should be a valid integer"),
        (V2_LITE | {"aux_loss_alpha": -1}, "aux_loss_alpha = -1: must be a number >= 0."),
        (V2_LITE | {"hidden_size": {}}, "hidden_size must be a single value"),
        (V2_LITE | {"rope_theta": "large"}, "rope_theta = 'large': must be a number >= 0."),
        (V2_LITE | {"rope_scaling": {"type": "yarn", "factor": []}}, "factor = []: must be"),
        (QWEN3 | {"router_aux_loss_coef": "much"}, "router_aux_loss_coef = 'much': must be"),
        (QWEN3 | {"num_hidden_layers": 0}, "no layer has experts"),
    ],
)
def test_a_config_that_cannot_be_read(config, said, tmp_path) -> None:
    with pytest.raises(EzpzError) as error:
        hf(tmp_path, config)
    assert said in str(error.value)


# Files and exit codes -----------------------------------------------------------------------------


def test_the_command_reports_writes_and_counts_what_is_lost(tmp_path: Path, capsys) -> None:
    old, new = tmp_path / "config.json", tmp_path / "mine.toml"
    old.write_text(json.dumps(QWEN3))
    assert cli.main(["convert", "--from", "hf", str(old), str(new)]) == 0
    output = capsys.readouterr().out
    assert f"{new} written" in output
    assert "kept: now router_top_k" in output
    assert load_flavor("mine", near=tmp_path).base == "qwen3/30B-A3B"
    old.write_text(json.dumps(V2 | {"norm_topk_prob": True}))
    assert cli.main(["convert", "--from", "hf", str(old)]) == 1
    output = capsys.readouterr().out
    assert "differs: " in output
    # Printed, in the flavor, and in the key's own row, which was said to be kept.
    assert output.count("note: config.json has rms_norm_eps = 1e-06") == 2
    assert "\n# note: config.json has rms_norm_eps" in output
    assert "differs: no flavor can set it" in output
    assert "num_experts = 160 # n_routed_experts" in output


@pytest.mark.parametrize(
    ("text", "new", "said"),
    [
        ("{", "mine.toml", "config.json: is not JSON"),
        (json.dumps(QWEN3), "mine.txt", "a flavor's name must end in .toml"),
        (json.dumps(QWEN3), "there.toml", "there.toml already exists"),
        (json.dumps(QWEN3), "there.toml/mine.toml", "cannot be written"),
    ],
)
def test_nothing_is_written_or_overwritten(text, new, said, tmp_path, capsys) -> None:
    (tmp_path / "there.toml").write_text("# mine\n")
    old = tmp_path / "config.json"
    old.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", "--from", "hf", str(old), str(tmp_path / new)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "there.toml"}
    assert (tmp_path / "there.toml").read_text() == "# mine\n"


def test_a_host_that_takes_no_balance_is_refused(tmp_path: Path, monkeypatch) -> None:
    class Older:
        def architecture(self, flavor: Flavor) -> None:
            return None

    monkeypatch.setattr(convert_foreign, "host", Older)
    with pytest.raises(EzpzError, match=r"needs torchtitan 0\.3 or later"):
        hf(tmp_path, V2_LITE)


def test_a_file_that_is_not_there_and_two_modes_at_once(tmp_path: Path, capsys) -> None:
    for arguments, said in (
        (["--from", "megatron", str(tmp_path / "no.yaml")], "no.yaml: cannot be read: No such"),
        (["--from", "hf", "--lint", "a.sh"], "--lint reads scripts, and --from a config"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["convert", *arguments])
        assert said in capsys.readouterr().err
