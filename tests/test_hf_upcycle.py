"""``ezpz-moe upcycle`` of Hugging Face's safetensors: what is read, and which models are others.

Legend: :mod:`upcycle_cases`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import check_host, host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

from hf_models import assert_same_logits, drawn, with_the_hosts_eps  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from upcycle_cases import (  # noqa: E402
    LAYERS,
    MLA,
    NORMALIZED,
    TOKENS_BL,
    F,
    in_float64,
    logits,
    refused,
    run,
    save,
    tensors,
    upcycled,
)

from ezpz_moe.tools.checkpoints.huggingface.config import dense_classes  # noqa: E402

SCALED = MLA.replace('scaling = "none"\nrope_factor = 1.0', 'scaling = "yarn"\nrope_factor = 4.0')
"""The scores of MLA are then scaled, too."""
DENSE = {"intermediate_size": 2 * F, "first_k_dense_replace": LAYERS}
OTHER_ROPE = {"rope_type": "linear", "factor": 2.0}


@pytest.fixture
def mla(tmp_path, monkeypatch) -> None:
    """The flavor "mla", whose model has multi-head latent attention."""
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    (tmp_path / "mla.toml").write_text(NORMALIZED + SCALED)


def config_of(flavor: str, model_type: str) -> dict[str, Any]:
    """What transformers calls the dense model of a flavor."""
    architecture = host().architecture(load_flavor(flavor))
    assert architecture is not None
    (form,) = (
        each for each in dense_classes(architecture) if each.config["model_type"] == model_type
    )
    return form.config | DENSE


def write(folder: Path, config: dict[str, Any] | None, state: dict[str, torch.Tensor]) -> Path:
    """Write safetensors of the host's tensors, and a config beside them."""
    folder.mkdir(exist_ok=True)
    keys = host().adapter(load_flavor("small")).to_hf(state)
    save_file({key: each.clone() for key, each in keys.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


# What is computed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavor", "model_type", "tied"),
    [
        ("small", "qwen3", True),
        ("mla", "deepseek_v2", False),
        ("mla", "deepseek_v3", False),
    ],
)
def test_a_dense_model_of_transformers_stays_what_it_is(
    qwen3, mla, flavor, model_type, tied, tmp_path, capsys
) -> None:
    (tmp_path / "config").mkdir()
    config = config_of(flavor, model_type) | {"tie_word_embeddings": tied}
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    dense = drawn(tmp_path / "config")
    dense.save_pretrained(tmp_path / "dense")
    assert run(tmp_path / "dense", flavor, tmp_path / "out", "--router-std", 1) == 0
    said = capsys.readouterr().out
    assert "the model computes what the dense model does" in said
    assert ("lm_head.weight is a copy of model.embed_tokens.weight" in said) == tied
    ours_BLV = logits(in_float64(upcycled(tmp_path / "out", flavor)))
    with torch.no_grad():
        theirs_BLV = with_the_hosts_eps(dense)(TOKENS_BL).logits
    assert_same_logits(theirs_BLV, ours_BLV, 1e-5)


# Which models are others -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavor", "model_type", "change", "difference"),
    [
        ("small", "qwen3", {"model_type": "llama", "architectures": None}, "model_type is 'llama'"),
        ("small", "qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu', the flavor has silu"),
        ("small", "qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        (
            "small",
            "qwen3",
            {"num_attention_heads": 2},
            "num_attention_heads is 2, the flavor has 4",
        ),
        ("small", "qwen3", {"rope_parameters": None, "rope_theta": 1e6}, "rope_theta is 1000000.0"),
        ("small", "qwen3", {"rope_parameters": OTHER_ROPE}, "rope: rope_type is 'linear'"),
        ("mla", "deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("mla", "deepseek_v3", {"qk_nope_head_dim": 4}, "qk_nope_head_dim is 4, the flavor has 8"),
        ("mla", "deepseek_v2", {"rope_parameters": None}, "rope: rope_type is 'default'"),
        (
            "mla",
            "deepseek_v2",
            {"rope_parameters": {"mscale": 1.0, "mscale_all_dim": 1.0}},
            "rope: mscale_all_dim is 1.0, the flavor has 0.7",
        ),
    ],
)
def test_what_shapes_do_not_show_is_compared(
    qwen3, mla, flavor, model_type, change, difference, tmp_path, capsys
) -> None:
    config = config_of(flavor, model_type)
    if change.get("rope_parameters") and change["rope_parameters"] is not OTHER_ROPE:
        change = {"rope_parameters": config["rope_parameters"] | change["rope_parameters"]}
    folder = write(tmp_path / "dense", config | change, qwen3(2 * F).state_dict())
    said = refused(capsys, folder, flavor, tmp_path / "out")
    assert f"{folder}: is not a dense model for flavor {flavor} (for transformers, " in said
    assert difference in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05, torchtitan computes with 1e-06"),
        (None, "There is no config.json: only names and shapes were compared"),
    ],
)
def test_what_no_flavor_can_set_is_said(qwen3, change, said, tmp_path, capsys) -> None:
    config = None if change is None else config_of("small", "qwen3") | change
    folder = write(tmp_path / "dense", config, qwen3(2 * F).state_dict())
    assert run(folder, "small", tmp_path / "out") == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {}, None])
def test_an_output_matrix_that_is_absent_is_tied_only_if_the_config_says_so(
    qwen3, tmp_path, capsys, config
) -> None:
    """Otherwise the file that has it may be missing, and the model would compute something else."""
    state = qwen3(F).state_dict()
    del state["lm_head.weight"]
    folder = write(tmp_path / "dense", config, state)
    said = refused(capsys, folder, "small", tmp_path / "out")
    assert f"{folder}: has no lm_head.weight, and no config.json there says" in said
    assert not list(tmp_path.glob("out*"))


def test_an_output_matrix_that_is_said_to_be_tied_and_is_not_is_refused(
    qwen3, tmp_path, capsys
) -> None:
    folder = write(tmp_path / "dense", {"tie_word_embeddings": True}, qwen3(F).state_dict())
    said = refused(capsys, folder, "small", tmp_path / "out")
    assert "but lm_head.weight (in model.safetensors) is not model.embed_tokens.weight" in said


# Which files are read ----------------------------------------------------------------------------


def test_safetensors_give_the_same_as_a_checkpoint(qwen3, tmp_path, capsys):
    dense = qwen3(2 * F, tied=True)
    save(dense, tmp_path / "run" / "checkpoint" / "step-3")
    state = dense.state_dict()
    del state["lm_head.weight"]  # tied to the embeddings: such files do not have it
    file = write(tmp_path / "hf", {"tie_word_embeddings": True}, state) / "model.safetensors"
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(file) | computed, file)
    assert run(tmp_path / "run", "small", tmp_path / "a", "--noise", 0.1) == 0
    assert "step-3" in capsys.readouterr().out
    assert run(tmp_path / "hf", "small", tmp_path / "b", "--noise", 0.1) == 0
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_that_the_index_names_and_that_is_not_there_is_named(qwen3, tmp_path, capsys):
    folder = write(tmp_path / "hf", None, qwen3(F).state_dict())
    file = (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(file), file.name) | {"more": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(capsys, tmp_path / "hf", "small", tmp_path / "out")
    assert f"{tmp_path / 'hf' / 'b.safetensors'}: is missing" in said
    (tmp_path / "hf" / "a.safetensors").unlink()
    said = refused(capsys, tmp_path / "hf", "small", tmp_path / "out")
    assert f"{tmp_path / 'hf' / 'a.safetensors'}: is missing" in said
    assert "2 of its files are missing" in said


def test_safetensors_of_something_else_are_refused(qwen3, tmp_path, capsys):
    """Names that no adapter knows, and a number in a matrix's place."""
    keys = load_file(write(tmp_path / "hf", None, qwen3().state_dict()) / "model.safetensors")
    for key in ("model.layers.mlp.weight", "model.layers.0.", "layers", "", "..experts.."):
        save_file(keys | {key: torch.ones(1)}, tmp_path / "hf/model.safetensors")
        said = refused(capsys, tmp_path / "hf", "small", tmp_path / "out")
        assert "for which flavor small has no place" in said
    gate = "model.layers.0.mlp.gate_proj.weight"
    scaled = keys | {f"{gate}_scale_inv": torch.ones(1, 1)}
    save_file(scaled, tmp_path / "hf/model.safetensors")
    said = refused(capsys, tmp_path / "hf", "small", tmp_path / "out")
    assert f"{gate} is quantized (FP8)" in said
    save_file(keys | {gate: torch.tensor(1.0)}, tmp_path / "hf/model.safetensors")
    said = refused(capsys, tmp_path / "hf", "small", tmp_path / "out")
    assert "layers.0.feed_forward.w1.weight is []" in said
