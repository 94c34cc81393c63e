"""Flavors are data: names, variants, inheritance, search order, and what a wrong file gets."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from flavor_files import VARIANTS

from ezpz_moe.compute.names import known_backend_names
from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.flavor_schema import Attention, Dimensions, Flavor, Rope
from ezpz_moe.config.flavors import flavor_names, load_flavor, variant_suffixes
from ezpz_moe.errors import EzpzError

REPOSITORY = Path(__file__).parent.parent
SHIPPED = REPOSITORY / "flavors"

# The sizes that upstream does not have, written down twice on purpose: nothing else can tell a slip
# of the finger from a number that was meant. Upstream's own are compared in test_models.py.
OWN_SIZES = {
    "500M": (512, 12, 16, 512, 2048, 16, 3),
    "2B": (1024, 18, 16, 1024, 4096, 24, 3),
    "4B": (1536, 22, 12, 1024, 6144, 24, 3),
    "7B": (2048, 24, 24, 1280, 8192, 36, 3),
    "10B_2B": (2048, 27, 16, 1408, 10944, 36, 3),
    "small": (2048, 24, 16, 512, 4096, 64, 6),
}


def write(folder: Path, **files: str) -> Path:
    """Flavor files of these names and texts."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def size_of(flavor: Flavor) -> Dimensions:
    assert flavor.dimensions is not None
    return flavor.dimensions


def test_reading_flavors_imports_neither_torch_nor_the_host() -> None:
    code = (
        "import sys; from ezpz_moe.config.flavors import *\n"
        "[load_flavor(n) for n in flavor_names()]\n"
        "print(sorted({'torch', 'torchtitan'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


# Names --------------------------------------------------------------------------------------------


def test_names_are_the_files() -> None:
    files = {path.stem for path in SHIPPED.glob("*.toml") if path.stem != "_mla"}
    assert flavor_names() == sorted(files)


def test_variants_are_a_rule() -> None:
    suffixes = variant_suffixes()
    assert suffixes[""] == {}
    assert suffixes["_sdpa_for_loop"] == {"attention": "sdpa", "compute_backend": "for_loop"}
    assert len(suffixes) == (1 + len(get_args(Attention))) * (1 + len(known_backend_names()))


@pytest.mark.parametrize(
    "name", [name + variant for name in flavor_names() for variant in VARIANTS]
)
def test_every_name_loads_as_itself(name: str) -> None:
    flavor = load_flavor(name)
    assert flavor.name == name
    assert (flavor.dimensions is None) == (flavor.base is not None)


@pytest.mark.parametrize(
    ("name", "file", "attention", "backend"),
    [
        ("16B", "16B", "flex", "grouped_mm"),
        ("debugmodel_sdpa", "debugmodel", "sdpa", "grouped_mm"),
        ("16B_for_loop", "16B", "flex", "for_loop"),
        ("10B_2B_sdpa_batched_mm_padded", "10B_2B", "sdpa", "batched_mm_padded"),
        ("236B_flex_flash", "236B", "flex_flash", "grouped_mm"),
        ("236B_flex_flash_for_loop", "236B", "flex_flash", "for_loop"),
        ("gpt_oss_20b", "gpt_oss_20b", None, "grouped_mm"),
        ("gpt_oss_20b_for_loop", "gpt_oss_20b", None, "for_loop"),
    ],
)
def test_a_suffix_sets_attention_and_backend_and_nothing_else(
    name: str, file: str, attention: str | None, backend: str
) -> None:
    flavor, plain = load_flavor(name), load_flavor(file)
    assert (flavor.attention, flavor.compute_backend) == (attention, backend)
    assert (flavor.dimensions, flavor.base) == (plain.dimensions, plain.base)
    assert flavor.source == SHIPPED / f"{file}.toml"


def test_every_installed_backend_is_a_suffix() -> None:
    for backend in known_backend_names():
        assert load_flavor(f"16B_{backend}").compute_backend == backend


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("16b", "Did you mean '16B'?"),
        ("10B_2B_sdpa_batched_mm_paded", "Did you mean '10B_2B_sdpa_batched_mm_padded'?"),
        ("16B_for_loop_sdpa", "each also with [_<attention>][_<backend>]. Did you mean '16B_"),
        ("16B_", "Known are 10B_2B, 16B,"),
        ("", "Known are"),
        ("_mla", "_mla.toml is not a flavor: it is a parent"),
        ("_mla_sdpa", "unknown flavor '_mla_sdpa'"),
        ("../flavors/16B", "is a path. Write the flavor's name alone: '16B'"),
        ("./tiny", "'./tiny' is a path. A flavor is a name, that of a TOML file beside the job"),
        ("a\0b", "unknown flavor"),
    ],
)
def test_a_name_that_is_no_flavor(name: str, hint: str) -> None:
    with pytest.raises(EzpzError) as error:
        load_flavor(name)
    assert hint in str(error.value)


def test_a_file_that_cannot_be_read_is_no_flavor_that_is_known(tmp_path) -> None:
    """It may be a broken job. Whoever names it still learns what is wrong with it."""
    (tmp_path / "broken.toml").write_text("x = [")
    (tmp_path / "mine.toml").write_text('inherits = "16B"')
    with pytest.raises(EzpzError) as error:
        load_flavor("brokn", near=tmp_path)
    assert ", mine, " in str(error.value)
    assert "broken" not in str(error.value)
    with pytest.raises(EzpzError, match=r"broken\.toml: is not valid TOML"):
        load_flavor("broken", near=tmp_path)


def test_of_an_unknown_name_the_searched_folders_are_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path / "named"))
    (tmp_path / "named").mkdir()
    with pytest.raises(EzpzError, match="EZPZ_MOE_FLAVORS adds a folder") as error:
        load_flavor("mine", near=tmp_path)
    assert f"unknown flavor 'mine' in {tmp_path}, {tmp_path}/named, " in str(error.value)


# Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN_SIZES)
def test_dimensions_of_the_sizes_that_upstream_does_not_have(name: str) -> None:
    size = size_of(load_flavor(name))
    found = (
        *(size.dim, size.n_layers, size.n_heads, size.moe_hidden_dim, size.dense_hidden_dim),
        *(size.num_experts, size.router_top_k),
    )
    assert found == OWN_SIZES[name]
    special = ("small",)
    assert size.rope.theta == (50000.0 if name in special else 10000.0)
    assert size.router_route_norm is (name in special)
    shared = {"vocab_size": 256128, "n_dense_layers": 1, "num_shared_experts": 2}
    assert size.model_copy(update=shared) == size


def test_the_debug_model_has_the_embedded_tokenizers_vocabulary() -> None:
    tokenizer = json.loads((EMBEDDED_TOKENIZER / "tokenizer.json").read_text())
    assert size_of(load_flavor("debugmodel")).vocab_size == len(tokenizer["model"]["vocab"])


def test_every_key_is_documented() -> None:
    text = (REPOSITORY / "docs" / "reference" / "flavors.md").read_text()
    keys = [*Dimensions.model_fields, *(f"rope.{key}" for key in Rope.model_fields)]
    keys += ["inherits", "base", "attention", "compute_backend"]
    keys.remove("rope")
    assert [key for key in keys if f"`{key}`" not in text] == []


# Inheritance --------------------------------------------------------------------------------------


def test_a_child_changes_its_parent_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        wide='inherits = "16B"\nmoe_hidden_dim = 2816\n[rope]\ntheta = 5e5',
        wider='inherits = "wide"\ndim = 4096\ncompute_backend = "for_loop"',
    )
    parent, wider = load_flavor("16B"), load_flavor("wider", near=tmp_path)
    rope = size_of(parent).rope.model_copy(update={"theta": 5e5})
    changed = {"moe_hidden_dim": 2816, "dim": 4096, "rope": rope}
    assert wider.dimensions == size_of(parent).model_copy(update=changed)
    assert (wider.attention, wider.compute_backend) == ("flex", "for_loop")
    assert wider.source == tmp_path / "wider.toml"


def test_a_width_of_shared_experts_replaces_their_number_and_the_other_way_round(tmp_path: Path):
    write(tmp_path, wide='inherits = "16B"\nshared_hidden_dim = 100')
    write(tmp_path, two='inherits = "wide"\nnum_shared_experts = 2')
    size = load_flavor("wide", near=tmp_path).dimensions
    assert (size.num_shared_experts, size.shared_width(1408)) == (None, 100)
    assert load_flavor("two", near=tmp_path).dimensions.shared_width(1408) == 2816


def test_a_base_is_inherited_too(tmp_path: Path) -> None:
    write(tmp_path, mine='inherits = "qwen3_30B_A3B"\ncompute_backend = "for_loop"')
    flavor = load_flavor("mine_sdpa", near=tmp_path)
    assert (flavor.base, flavor.attention) == ("qwen3/30B-A3B", "sdpa")
    assert (flavor.compute_backend, flavor.dimensions) == ("for_loop", None)


def test_a_flavor_may_inherit_the_one_that_it_replaces(tmp_path: Path) -> None:
    write(tmp_path, **{"16B": 'inherits = "16B"\nnum_experts = 32'})
    replaced, shipped = load_flavor("16B", near=tmp_path), load_flavor("16B")
    assert replaced.dimensions == size_of(shipped).model_copy(update={"num_experts": 32})


def test_a_users_parent_does_not_change_shipped_flavors(tmp_path: Path) -> None:
    write(tmp_path, _mla="dim = 1", **{"16B": 'inherits = "_mla"'})
    assert load_flavor("10B_2B", near=tmp_path) == load_flavor("10B_2B")


# Where files are searched -------------------------------------------------------------------------


def test_the_jobs_folder_comes_before_the_users_and_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = write(tmp_path / "near", mine='inherits = "2B"')
    user = write(tmp_path / "user", mine='inherits = "4B"', **{"7B": 'inherits = "2B"'})
    assert load_flavor("7B", near=near).source.parent == SHIPPED
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(user))
    assert load_flavor("mine").source == user / "mine.toml"
    assert load_flavor("mine", near=near).source == near / "mine.toml"
    assert load_flavor("7B", near=near).source == user / "7B.toml"
    assert load_flavor("16B", near=near).source == SHIPPED / "16B.toml"
    assert {"mine", "16B"} <= set(flavor_names())
    assert len(set(flavor_names(near=near))) == len(flavor_names(near=near))


def test_a_file_is_more_exact_than_a_variant(tmp_path: Path) -> None:
    write(tmp_path, **{"2B_sdpa": 'inherits = "2B"\nattention = "varlen"'})
    assert load_flavor("2B_sdpa", near=tmp_path).attention == "varlen"
    assert load_flavor("2B_sdpa_for_loop", near=tmp_path).attention == "varlen"
    assert load_flavor("2B_flex", near=tmp_path).source.parent == SHIPPED


def test_a_job_beside_its_flavor_is_not_a_flavor(tmp_path: Path) -> None:
    job = '[model]\nname = "ezpz_moe"\nflavor = "16B"'
    write(tmp_path, job=job, **{"16B": job}, mine='inherits = "2B"')
    assert load_flavor("16B", near=tmp_path).source.parent == SHIPPED
    assert "job" not in flavor_names(near=tmp_path)
    assert "mine" in flavor_names(near=tmp_path)
    with pytest.raises(EzpzError, match=r"job\.toml is not a flavor: it has the \[model\] of"):
        load_flavor("job", near=tmp_path)


def test_a_file_whose_only_key_is_misspelt(tmp_path: Path) -> None:
    write(tmp_path, mine='dense_baseline = "16B"')
    meant = "'dense_baseline' is unknown. Did you mean 'dense_baseline_of'?"
    with pytest.raises(EzpzError, match=re.escape(meant)):
        load_flavor("mine", near=tmp_path)


def test_a_folder_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path / "gone"))
    with pytest.raises(EzpzError, match=r"EZPZ_MOE_FLAVORS = .*gone.*no such folder"):
        load_flavor("16B")


# Wrong files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer = 3", "unknown key 'n_layer'. Did you mean 'n_layers'?"),
        ("[rope]\nthetta = 3.0", "unknown key 'rope.thetta'. Did you mean 'theta'?"),
        ("dim = 0", "dim = 0: should be greater than or equal to 1."),
        ("dim = 9223372036854775807", "dim = 9223372036854775807: should be less than"),
        ("dim = true", "dim = True: should be a valid integer."),
        ('dim = "256"', "dim = '256': should be a valid integer."),
        ("mscale = nan", "mscale = nan: should be"),
        ("mscale = inf", "mscale = inf: should be a finite number."),
        ("qk_rope_head_dim = 63", "qk_rope_head_dim = 63: should be a multiple of 2."),
        ("router_route_norm = 1", "router_route_norm = 1: should be a valid boolean."),
        ("rope = 3", "rope = 3: should be a table."),
        ('router_score_func = "sofmax"', "Did you mean 'softmax'?"),
        ('attention = "spda"', "'flex', 'varlen', 'flex_flash' or 'sdpa'. Did you mean 'sdpa'?"),
        ('compute_backend = "forloop"', "batched_mm_padded"),
        ('compute_backend = "forloop"', "Did you mean 'for_loop'?"),
        ('inherits = "17B"', "inherits = '17B': there is no such flavor file. Did you mean '7B'?"),
        (
            'inherits = "16B_sdpa_for_loop"',
            'write inherits = "16B" with attention = "sdpa" and compute_backend = "for_loop".',
        ),
        ("inherits = [1]", "inherits = [1]: should be the name of a flavor."),
        ('inherits = "mine"', "inherits = 'mine': there is no such flavor file besides this one."),
        ('base = "qwen3/30B-A3B"', "base = 'qwen3/30B-A3B' takes every dimension"),
        ("n_dense_layers = 28", "n_dense_layers (28) must not exceed n_layers (27)"),
        ("router_top_k = 65", "router_top_k (65) must not exceed num_experts (64)"),
        ("[rope]\nbeta_slow = 33.0", "rope.beta_slow (33.0) must not exceed rope.beta_fast"),
        (
            "shared_hidden_dim = 3\nnum_shared_experts = 2",
            "shared_hidden_dim (3) is not num_shared",
        ),
        ("num_shared_experts = 0\nshared_gate = true", "shared_gate = true has no effect without"),
        ('expert_activation = "relu"', "expert_activation = 'relu': should be 'swiglu', 'geglu'"),
        ("router_num_expert_groups = 8", "must be set together"),
        ("router_num_limited_groups = 8", "must be set together"),
        (
            "router_num_expert_groups = 7\nrouter_num_limited_groups = 2",
            "num_experts (64) must be a multiple of router_num_expert_groups (7)",
        ),
        (
            "router_num_expert_groups = 128\nrouter_num_limited_groups = 8",
            "must be a multiple of router_num_expert_groups (128)",
        ),
        (
            "router_num_expert_groups = 8\nrouter_num_limited_groups = 9",
            "router_num_limited_groups (9) must not exceed router_num_expert_groups (8)",
        ),
        (
            "router_num_expert_groups = 32\nrouter_num_limited_groups = 2",
            "router_top_k (6) must not exceed the 4 experts of 2 groups",
        ),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    inherits = "" if "inherits" in text else 'inherits = "16B"\n'
    write(tmp_path, mine=inherits + text)
    with pytest.raises(EzpzError) as error:
        load_flavor("mine", near=tmp_path)
    assert "?." not in str(error.value)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    "text",
    [
        "router_top_k = 64",
        "n_dense_layers = 26",
        "n_dense_layers = 0",
        "router_num_expert_groups = 32\nrouter_num_limited_groups = 3",
        "router_num_expert_groups = 8\nrouter_num_limited_groups = 8",
    ],
)
def test_the_largest_and_smallest_that_fit_are_accepted(tmp_path: Path, text: str) -> None:
    write(tmp_path, mine=f'inherits = "16B"\n{text}')
    key, _, value = text.splitlines()[0].partition(" = ")
    assert getattr(size_of(load_flavor("mine", near=tmp_path)), key) == int(value)


def test_all_wrong_keys_are_named_at_once_each_with_the_file_that_sets_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        parent='inherits = "16B"\ndim = 0\n[rope]\ntheta = 0.5',
        child='inherits = "parent"\nn_heads = "many"',
    )
    with pytest.raises(EzpzError) as error:
        load_flavor("child", near=tmp_path)
    lines = str(error.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        f"{tmp_path / 'parent.toml'}: dim",
        f"{tmp_path / 'child.toml'}: n_heads",
        f"{tmp_path / 'parent.toml'}: rope.theta",
    ]


def test_missing_keys_are_listed_with_the_ways_out(tmp_path: Path) -> None:
    write(tmp_path, mine="dim = 256\n[rope]\ntheta = 1e4")
    with pytest.raises(EzpzError, match=r"missing keys: .*n_layers.*rope\.scaling.*inherits = "):
        load_flavor("mine", near=tmp_path)


def test_a_circle(tmp_path: Path) -> None:
    write(tmp_path, a='inherits = "b"', b='inherits = "c"', c='inherits = "b"')
    with pytest.raises(EzpzError, match=r"c\.toml: inherits: .* circle: b -> c -> b"):
        load_flavor("a", near=tmp_path)


def test_dimensions_beside_a_base_are_named_with_their_file(tmp_path: Path) -> None:
    write(tmp_path, mine='inherits = "qwen3_30B_A3B"\ndim = 256')
    with pytest.raises(EzpzError, match=r"would be ignored: dim \(mine\.toml\)"):
        load_flavor("mine", near=tmp_path)


@pytest.mark.parametrize("base", ['"qwen3"', '"/30B"', '"qwen3/"', '"qwen 3/30B"', "3"])
def test_a_base_that_is_no_module_and_flavor(tmp_path: Path, base: str) -> None:
    write(tmp_path, mine=f"base = {base}")
    with pytest.raises(EzpzError, match=r"mine\.toml: base = .*: should be"):
        load_flavor("mine", near=tmp_path)


def test_toml_that_does_not_parse_hides_no_other_flavor(tmp_path: Path) -> None:
    write(tmp_path, broken='inherits = "16B"\ndim = = 3')
    with pytest.raises(EzpzError, match=r"broken\.toml: .*line 2, column 7"):
        load_flavor("broken", near=tmp_path)
    assert load_flavor("16B", near=tmp_path).name == "16B"
    assert "broken" in flavor_names(near=tmp_path)
