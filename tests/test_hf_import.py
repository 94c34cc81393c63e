"""Imports that would compute something else, or lose tensors, are refused."""

from __future__ import annotations

import pytest
import torch

from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

import hf_cases  # noqa: E402
from hf_cases import changed, with_tensors  # noqa: E402

from ezpz_moe import cli  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")


exports = pytest.fixture(scope="module")(hf_cases.tiny_exports)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"routed_scaling_factor": 1.0}, "routed_scaling_factor is 1.0, the flavor has 2.5"),
        ({"topk_group": 1}, "topk_group is 1, the flavor has 2"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope: rope_type is"),
        (
            {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
            "model_type is 'deepseek_v2', not 'deepseek_v3'",
        ),
    ],
)
def test_another_config_is_refused(exports, config, message, tmp_path, capsys) -> None:
    case, (_, _, folder) = exports.case("deepseek_v3"), exports.plain("deepseek_v3")
    other = changed(folder, tmp_path / "other", config)
    with pytest.raises(SystemExit):
        case.remap(other, tmp_path / "back", "--to", "0.3")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_another_eps_is_said(exports, tmp_path, capsys) -> None:
    """No flavor can change that of torchtitan."""
    case, (_, _, folder) = exports.case("deepseek_v3"), exports.plain("deepseek_v3")
    other = changed(folder, tmp_path / "other", {"rms_norm_eps": 1e-6})
    assert case.remap(other, tmp_path / "back", "--to", "0.3") == 0
    assert "rms_norm_eps = 1e-06, torchtitan computes with 1e-05" in capsys.readouterr().out


BIAS = "model.layers.0.self_attn.o_proj.bias"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("deepseek_v3", lambda x: x | {BIAS: torch.ones(32)}, f"{BIAS} has no place"),
        (
            "deepseek_v3",
            lambda x: {key: each for key, each in x.items() if "e_score" not in key},
            "2 of 91 tensors are missing",
        ),
        (
            "gpt_oss",
            lambda x: {key.replace("up_proj", "up_proj_blocks"): each for key, each in x.items()},
            "is quantized (MXFP4)",
        ),
        (
            "gpt_oss",
            lambda x: {key: each for key, each in x.items() if "experts" not in key},
            "8 of 37 tensors are missing",
        ),
        (
            "qwen3_moe",
            lambda x: x | {f"{EXPERT}_scale_inv": torch.ones(1, 1)},
            "quantization_config=FineGrainedFP8Config(dequantize=True)",
        ),
        (
            "deepseek_v3",
            lambda x: x | {EXPERT: x[EXPERT].T.contiguous()},
            f"{EXPERT} has the shape [32, 24], but the flavor's model wants [24, 32]",
        ),
        ("deepseek_v3", lambda x: x | {BIAS: torch.zeros(32)}, None),
        ("deepseek_v3", lambda x: x | {"model.layers.3.eh_proj.weight": torch.ones(2)}, None),
    ],
)
def test_tensors_that_would_be_lost_are_refused(
    exports, kind, change, message, tmp_path, capsys
) -> None:
    """No message names the trainer's own import, which leaves gpt_oss's experts random."""
    case, (_, _, folder) = exports.case(kind), exports.plain(kind)
    other = with_tensors(folder, tmp_path / "other", change)
    if message is None:
        assert case.remap(other, tmp_path / "back", "--to", "0.3") == 0
        return
    with pytest.raises(SystemExit):
        case.remap(other, tmp_path / "back", "--to", "0.3")
    said = capsys.readouterr().err
    assert message in said
    assert "initial_load" not in said


def test_tensors_of_other_names_that_are_quantized_are_said_to_be(
    exports, tmp_path, capsys
) -> None:
    """The names depend on the method, such as AWQ's; the config has the same key for all."""
    case, (_, _, folder) = exports.case("qwen3_moe"), exports.plain("qwen3_moe")
    described = changed(folder, tmp_path / "said", {"quantization_config": {"quant_method": "awq"}})
    other = with_tensors(
        described,
        tmp_path / "awq",
        lambda x: {key.replace("up_proj.weight", "up_proj.qweight"): x[key] for key in x},
    )
    with pytest.raises(SystemExit):
        case.remap(other, tmp_path / "back", "--to", "0.3")
    said = capsys.readouterr().err
    assert "16 of 69 tensors are missing. config.json says that they are quantized" in said


def test_the_trainer_reads_fp8_if_checkpoints_are_enabled(
    exports, monkeypatch, tmp_path, capsys
) -> None:
    """Otherwise it starts with random weights; and it takes no relative path."""
    case, (_, _, folder) = exports.case("deepseek_v3"), exports.plain("deepseek_v3")
    scale = {f"{EXPERT}_scale_inv": torch.ones(1, 1)}
    with_tensors(folder, tmp_path / "fp8", lambda x: x | scale)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        case.remap("fp8", "back", "--to", "0.3")
    said = capsys.readouterr().err
    assert f"{EXPERT} is quantized (FP8)" in said
    assert "--checkpoint.enable --checkpoint.initial_load_in_hf " in said
    assert f"--checkpoint.initial_load_path {tmp_path / 'fp8'}" in said


def test_analyze_reads_an_export_as_its_checkpoint(exports, capsys, tmp_path) -> None:
    """What both say, but for the folder; and what an import would say of the model."""
    case, (_, checkpoint, folder) = exports.case("deepseek_v3"), exports.plain("deepseek_v3")
    (tmp_path / "text.txt").write_text("The host reads a checkpoint tensor by tensor. " * 20)
    said = []
    for weights in (checkpoint, folder):
        flags = ["--config", case.job, "--data", str(tmp_path / "text.txt"), "--seq-len", "32"]
        capsys.readouterr()
        assert cli.main(["analyze", str(weights), *flags]) == 0
        said.append(capsys.readouterr().out.replace(str(weights), ""))
    assert said[1].startswith(said[0])
    assert "transformers normalizes attention's latents" in said[1].removeprefix(said[0])
