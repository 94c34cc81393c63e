"""Exports and imports compute what the host computes: by logits, in float32, with transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.hosts.detect import check_host, host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

import hf_cases  # noqa: E402
from hf_cases import CLASSES, load, save  # noqa: E402
from hf_models import (  # noqa: E402
    BOUND,
    TOKENS_L,
    assert_same_logits,
    drawn,
    logits,
    opened,
    with_the_hosts_eps,
)
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from ezpz_moe.tools.analysis.dropped_bias import _sample  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]


exports = pytest.fixture(scope="module")(hf_cases.tiny_exports)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_export_computes_the_same(exports, kind) -> None:
    weights, _, folder = exports.plain(kind)
    model = opened(folder)
    assert type(model).__name__ == CLASSES[kind]
    assert model.dtype == torch.float32
    ours_LV = exports.case(kind).logits(weights, TOKENS_L)
    assert_same_logits(logits(model), ours_LV)
    assert_same_logits(logits(with_the_hosts_eps(model)), ours_LV, BOUND / 10)


def test_groups_ranked_by_their_best_expert_are_those_of_deepseek_v2(exports, tmp_path) -> None:
    case = exports.case("deepseek_v2", f'\n{GROUPS}router_group_score = "max"\n')
    weights, source, _ = exports.plain("deepseek_v2")
    assert case.remap(source, tmp_path / "hf", "--to", "hf") == 0
    ours_LV = case.logits(weights, TOKENS_L)
    assert_same_logits(logits(with_the_hosts_eps(opened(tmp_path / "hf"))), ours_LV, BOUND / 10)
    # The two best experts of a group rank other groups highest.
    two_best_LV = exports.case("deepseek_v2", f"\n{GROUPS}").logits(weights, TOKENS_L)
    assert (two_best_LV - ours_LV).abs().max() > BOUND * ours_LV.abs().max()


def test_a_changed_model_of_the_hosts_is_exported(exports, tmp_path) -> None:
    """Its config would have the base's experts and layers, or its adapter would look for them."""
    change = "n_layers = 3\ndim = 48\nnum_experts = 6\nrouter_top_k = 2\nmoe_hidden_dim = 16\n"
    case = exports.case("qwen3_moe", f"[change]\n{change}")
    weights = hf_cases.random_weights(case, bias=0)
    source = save(weights, case.folder / "step-7")
    assert case.remap(source, tmp_path / "hf", "--to", "hf") == 0
    model = with_the_hosts_eps(opened(tmp_path / "hf"))
    assert_same_logits(logits(model), case.logits(weights, TOKENS_L), BOUND / 10)
    assert case.remap(tmp_path / "hf", tmp_path / "step-0", "--to", "0.3") == 0
    back = load(tmp_path / "step-0")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in back if "bias" not in name)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_saved_model_is_imported(exports, kind, tmp_path) -> None:
    case, (_, _, folder) = exports.case(kind), exports.plain(kind)
    model = drawn(folder)
    model.save_pretrained(tmp_path / "saved")
    assert case.remap(tmp_path / "saved", tmp_path / "step-0", "--to", "0.3") == 0
    ours_LV = case.logits(load(tmp_path / "step-0"), TOKENS_L)
    assert_same_logits(logits(model), ours_LV)
    assert_same_logits(logits(with_the_hosts_eps(model)), ours_LV, BOUND / 10)


def test_biases_are_dropped_only_when_asked_for(exports, tmp_path, capsys) -> None:
    """The last layer's bias forces expert 5, and nothing after it: an independent count."""
    case = exports.case("qwen3_moe")
    weights = dict(exports.plain("qwen3_moe")[0])
    weights["layers.1.moe.expert_bias_E"] = torch.eye(8)[5] * 10
    source, target = save(weights, tmp_path / "step-7"), tmp_path / "hf"
    with pytest.raises(SystemExit):
        case.remap(source, target, "--to", "hf")
    said = capsys.readouterr().err
    assert "layers.1.moe.expert_bias_E choose experts (biases up to 10)" in said
    assert "--drop-bias" in said
    assert not target.exists()
    assert case.remap(source, target, "--to", "hf", "--drop-bias") == 0
    said = capsys.readouterr().out
    text = _sample(host().analysis().encoder(str(EMBEDDED_TOKENIZER), case.flavor))
    tokens_SL = torch.stack([each.tokens_L for each in text])
    forced = 0
    model = opened(target)
    for tokens_L, sequence in zip(tokens_SL, text, strict=True):
        with torch.inference_mode():
            positions = sequence.positions_L.unsqueeze(0)
            output = model(tokens_L.unsqueeze(0), position_ids=positions, output_router_logits=True)
        chosen_LK = output.router_logits[1].view(-1, 8).topk(3).indices
        forced += int((chosen_LK != 5).all(-1).sum())
    choices = tokens_SL.numel() * 3 * 2
    assert f"changes {forced:,} of {choices:,} choices ({forced / choices:.1%})" in said
    assert f"{forced:,} of {choices:,}" in (target / "README.md").read_text()


@pytest.mark.parametrize("kind", ["deepseek_v2", "gpt_oss"])
def test_biases_that_no_class_has_are_refused(exports, kind, tmp_path, capsys) -> None:
    weights = dict(exports.plain(kind)[0])
    weights["layers.1.moe.expert_bias_E"] = torch.full((8,), 1e-3)
    source = save(weights, tmp_path / "step-7")
    with pytest.raises(SystemExit):
        exports.case(kind).remap(source, tmp_path / "hf", "--to", "hf")
    assert f"{CLASSES[kind]} has no place for them" in capsys.readouterr().err


def test_drop_bias_that_would_drop_nothing_is_refused(exports, tmp_path, capsys) -> None:
    case, (_, source, folder) = exports.case("deepseek_v3"), exports.plain("deepseek_v3")
    for arguments in (
        (source, tmp_path / "hf", "--to", "hf"),
        (folder, tmp_path / "x", "--to", "0.3"),
    ):
        with pytest.raises(SystemExit):
            case.remap(*arguments, "--drop-bias")
        assert "leaves out no selection bias" in capsys.readouterr().err


GROUPS = "router_num_expert_groups = 4\nrouter_num_limited_groups = 2\n"


@pytest.mark.parametrize(
    ("kind", "extra", "difference"),
    [
        ("deepseek_v2", GROUPS, "2 of 4 groups, chosen by their two best experts"),
        ("deepseek_v2", "router_route_norm = true", "normalizes the weights of softmax"),
        ("deepseek_v2", "n_heads = 3", "a dim (32) that is not a multiple of its 3 heads"),
        (
            "deepseek_v3",
            f'{GROUPS}router_group_score = "max"',
            "2 of 4 groups, chosen by their best expert; DeepseekV3 chooses them by the two best",
        ),
        (
            "deepseek_v3",
            'router_score_func = "sqrtsoftplus"',
            'router_score_func = "sqrtsoftplus"',
        ),
        ("deepseek_v3", "[router]\ntemperature = 2", "router.temperature is 2"),
        (
            "deepseek_v3",
            "[router]\ntemperature = {start = 2, end = 1, steps = 14}",
            "router.temperature is 1.5",
        ),
        ("qwen3_moe", '[router]\nactivation = "softplus"', 'router.activation = "softplus"'),
        (
            "gpt_oss",
            '[router]\nrouting = "balanced"',
            'router.routing = "balanced" chooses experts without looking',
        ),
        (
            "qwen3_moe",
            '[router]\nrouting = "relu"\nactivation = "relu_rmsnorm"',
            'router.routing = "relu" uses as many experts as have a score',
        ),
        (
            "deepseek_v3",
            '[router]\nactivation = "relu_rmsnorm"\nlearned_scale = true',
            "router.learned_scale = true is a weight of the gate",
        ),
        ("qwen3_moe", "[router]\nnull_experts = 2", "router.null_experts = 2"),
        ("qwen3_moe", "[router]\nconstant_experts = 1", "router.constant_experts = 1"),
        ("qwen3_moe", "[router]\ncopy_experts = 1", "router.copy_experts = 1"),
    ],
)
def test_a_model_of_no_class_is_refused(exports, kind, extra, difference, tmp_path, capsys) -> None:
    _, source, _ = exports.plain(kind)
    case = exports.case(kind, f"\n{extra}\n")
    with pytest.raises(SystemExit):
        case.remap(source, tmp_path / "hf", "--to", "hf")
    said = capsys.readouterr().err
    assert (
        f"ezpz_moe knows no class of transformers that computes the model of flavor {kind}" in said
    )
    assert difference in said
    assert not (tmp_path / "hf").exists()


def test_the_step_of_a_schedule_must_be_known(exports, monkeypatch, tmp_path, capsys) -> None:
    """At the end of its schedule the temperature would not matter."""
    _, source, _ = exports.plain("deepseek_v3")
    moves = "\n[router]\ntemperature = {start = 2, end = 1, steps = 14}\n"
    case = exports.case("deepseek_v3", moves)
    (tmp_path / "final").symlink_to(source)
    shutil.copytree(source, tmp_path / "best")
    monkeypatch.chdir(source)
    for folder, said in (
        (".", "temperature is 1.53846 at step 7"),
        (tmp_path / "final", "temperature is 1.53846 at step 7"),
        (tmp_path / "best", "temperature moves from 2 to 1, and the step is not known"),
    ):
        with pytest.raises(SystemExit):
            case.remap(folder, tmp_path / "hf", "--to", "hf")
        assert said in capsys.readouterr().err


def test_an_export_is_not_exported_again(exports, tmp_path, capsys) -> None:
    case, (_, _, folder) = exports.case("deepseek_v3"), exports.plain("deepseek_v3")
    with pytest.raises(SystemExit):
        case.remap(folder, tmp_path / "hf", "--to", "hf")
    assert "holds safetensors, which --to hf writes" in capsys.readouterr().err


def test_what_matters_in_training_alone_is_exported(exports, tmp_path) -> None:
    """Without selection biases in the run, those that the class has are zero."""
    case = exports.case(
        "deepseek_v3",
        "\n[router]\njitter_noise = 0.1\nfreeze = true\ntemperature = {start = 2, end = 1, steps "
        '= 7}\n[balance]\nbias_update = "none"\naux_loss = 0.01\n',
    )
    weights, _, _ = exports.plain("deepseek_v3")
    weights = {name: tensor for name, tensor in weights.items() if "expert_bias" not in name}
    source = save(weights, tmp_path / "step-8")
    assert case.remap(source, tmp_path / "hf", "--to", "hf") == 0
    model = opened(tmp_path / "hf")
    assert not model.model.layers[1].mlp.gate.e_score_correction_bias.any()
    assert_same_logits(logits(model), case.logits(weights, TOKENS_L, step=8))
    assert case.remap(tmp_path / "hf", tmp_path / "back", "--to", "0.3") == 0
    assert load(tmp_path / "back").keys() == weights.keys()


def test_a_vision_tower_is_refused_both_ways(exports, tmp_path, capsys) -> None:
    _, source, folder = exports.plain("deepseek_v2")
    case = exports.case("deepseek_v2")
    (case.folder / "kimi.toml").write_text('base = "kimi_k2_7/debugmodel"\n')
    job = case.folder / "kimi_job.toml"
    job.write_text('[model]\nname = "ezpz_moe"\nflavor = "kimi"\n')
    for arguments in (
        (source, tmp_path / "x", "--to", "hf"),
        (folder, tmp_path / "y", "--to", "0.3"),
    ):
        with pytest.raises(SystemExit):
            hf_cases.cli.main(["ckpt", "remap", *map(str, arguments), "--model", str(job)])
        assert "it has a vision tower" in capsys.readouterr().err


def test_the_folder_needs_nothing_else(exports) -> None:
    case, (_, _, folder) = exports.case("qwen3_moe"), exports.plain("qwen3_moe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "A text of 12345 tokens,\n  or fewer."
    begin, *ids, end = host().analysis().encoder(str(EMBEDDED_TOKENIZER), case.flavor)(text)
    assert tokenizer(text)["input_ids"] == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (begin, end)
    model = opened(folder)
    assert model.generation_config.eos_token_id == end
    assert model.config.bos_token_id == begin
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (file,) = folder.glob("*.safetensors")
    size = sum(each.nbytes for each in load_file(file).values())
    assert index["metadata"]["total_size"] == size
    card = (folder / "README.md").read_text()
    assert "Training step: 7" in card
    assert "Flavor: qwen3_moe (torchtitan's qwen3/tiny_moe)" in card
    assert len(card.splitlines()) == 9


def test_a_tokenizer_without_a_class_stays_what_it_is(exports, tmp_path) -> None:
    """transformers would take Qwen2Tokenizer for qwen3_moe, which cuts text in its own way."""
    _, source, _ = exports.plain("qwen3_moe")
    case = exports.case("qwen3_moe", "# with its own tokenizer\n")
    (case.folder / "assets").mkdir()
    shutil.copy(EMBEDDED_TOKENIZER / "tokenizer.json", case.folder / "assets")
    (case.folder / "assets" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    job = Path(case.job)
    job.write_text(job.read_text() + f'hf_assets_path = "{case.folder / "assets"}"\n')
    assert case.remap(source, tmp_path / "hf", "--to", "hf") == 0
    text = "don't  split\n\n 12345"
    _, *ids, _ = host().analysis().encoder(str(EMBEDDED_TOKENIZER), case.flavor)(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"] == ids
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None
    assert opened(tmp_path / "hf").generation_config.eos_token_id == [1, 7]


def test_a_job_without_its_tokenizer_is_refused(exports, tmp_path, capsys):
    _, source, _ = exports.plain("qwen3_moe")
    case = exports.case("qwen3_moe", "# whose tokenizer is gone\n")
    job = Path(case.job)
    job.write_text(job.read_text() + f'hf_assets_path = "{tmp_path / "gone"}"\n')
    with pytest.raises(SystemExit):
        case.remap(source, tmp_path / "hf", "--to", "hf")
    assert "hf_assets_path holds no tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_the_lines_of_the_documents_run(exports, monkeypatch, capsys) -> None:
    """docs/guides/checkpoints.md opens an export and samples from it in five lines."""
    page = (Path(__file__).parent.parent / "docs" / "guides" / "checkpoints.md").read_text()
    (code,) = re.findall(r"```python\n(from transformers.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 5
    _, _, folder = exports.plain("deepseek_v2")
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip()
