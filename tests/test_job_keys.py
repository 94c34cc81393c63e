"""The table of the trainer's TOML keys: complete for 0.2, and true of the installed host.

The list of 0.2's keys and defaults comes from its wheel (``scripts/list_titan_0_2_keys.py``).
"""

import ast
import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import ConfigDict, TypeAdapter

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host, presumed_host

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.trainer import Trainer  # noqa: E402

from ezpz_moe.config.job import Job  # noqa: E402
from ezpz_moe.config.keys import Key  # noqa: E402
from ezpz_moe.hosts.jobs import load_job  # noqa: E402
from ezpz_moe.hosts.titan.job import trainer_config  # noqa: E402

FLAVOR = "debugmodel_sdpa"
ROWS = {
    f"{section}.{name}": row
    for section, keys in presumed_host().job_keys().items()
    for name, row in keys.items()
}
FIELDS = {name: row for name, row in ROWS.items() if row.path is not None}
GONE = {name: row for name, row in ROWS.items() if row.message}

LIST_0_2 = Path(__file__).parent / "data" / "titan_0_2_2_keys.txt"
DEFAULTS_0_2 = dict(line.split(" = ", maxsplit=1) for line in LIST_0_2.read_text().splitlines())

HOPPER_ONLY = "parallelism.enable_fsdp_symm_mem"  # the host refuses it elsewhere

# Keys that count only together with others.
FOLLOWED_BY = {
    "checkpoint.create_seed_checkpoint": {"checkpoint.last_save_model_only"},
    "checkpoint.last_save_in_hf": {"checkpoint.last_save_model_only"},
}
"""Keys that ask for the model alone, which a job that does not say otherwise then saves."""

NEEDED = {
    "parallelism.context_parallel_degree": {"parallelism.spmd_backend": "partial_dtensor"},
    "activation_checkpoint.memory_budget": {
        "activation_checkpoint.mode": "memory_budget",
        "compile.enable": True,
    },
    "activation_checkpoint.visualize_memory_budget_pareto": {
        "activation_checkpoint.mode": "memory_budget",
        "compile.enable": True,
    },
    "parallelism.enable_async_tensor_parallel": {"compile.enable": True},
    "checkpoint.initial_load_in_hf_quantized": {
        "checkpoint.initial_load_in_hf": True,
        "checkpoint.initial_load_path": "/checkpoint",
    },
    "parallelism.expert_parallel_degree": {"parallelism.spmd_backend": "partial_dtensor"},
    "checkpoint.initial_load_model_only": {"checkpoint.initial_load_path": "/checkpoint"},
}
# Values with a meaning that no type tells.
SAMPLES = {
    "checkpoint.keep_latest_k": 2,
    "training.seq_len": 4096,
    "loss.num_chunks": 4,
    "parallelism.expert_parallel_degree": 2,
    "parallelism.context_parallel_degree": 2,
    "parallelism.pipeline_parallel_degree": 2,
    "parallelism.pipeline_parallel_schedule": "GPipe",
    "model.hf_assets_path": "/assets",
    "checkpoint.initial_load_path": "gs://bucket/step-10",
    "optimizer.lr": 3,  # an integer is a number
    "lr_scheduler.total_steps": 20000,  # no run may be longer, and one has 10000 if nothing is said
}


@pytest.fixture(autouse=True)
def _no_rule_of_this_cpus(cpu_with) -> None:
    """A job trains in float32 where the CPU emulates bfloat16; here it is about the table alone."""
    cpu_with("float32,bfloat16")


def default_0_2(name: str) -> Any:
    """The default as a value; ``...`` where there is none that TOML can hold."""
    text = DEFAULTS_0_2[name]
    text = text.removeprefix("field(default_factory=").removesuffix(")").removeprefix("lambda: ")
    value = ast.literal_eval({"list": "[]"}.get(text, text))
    return ... if value is None else value


def accepts(row: Key, value: Any) -> bool:
    adapter = TypeAdapter(row.type, config=ConfigDict(strict=True))
    try:
        adapter.validate_python(value)
    except ValueError:
        return False
    return True


def sample(row: Key, current: Any) -> Any:
    """A valid value other than ``current``."""
    candidates = [not current, 1, 2, 0, 0.25, 0.5, "eager", ["text"], [["text"]], ["model"]]
    schema = TypeAdapter(row.type).json_schema()
    candidates += schema.get("enum", [schema.get("const")])
    valid = [value for value in candidates if accepts(row, value)]
    return next((value for value in valid if value != current), valid[0])


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in a config, the model and its own digest apart."""
    if dataclasses.is_dataclass(node):
        items = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
        items = {name: item for name, item in items.items() if not name.startswith("_")}
        for apart in ("model_spec", "written"):
            items.pop(apart, None)
    elif isinstance(node, dict):
        items = node
    elif isinstance(node, tuple) or (
        isinstance(node, list) and any(map(dataclasses.is_dataclass, node))
    ):
        items = {str(i): item for i, item in enumerate(node)}
    else:
        yield path, node
        return
    for name, item in items.items():
        yield from leaves(item, f"{path}.{name}" if path else name)


def config_leaves(values: dict[str, Any]) -> dict[str, Any]:
    return dict(leaves(trainer_config(Job(flavor=FLAVOR, values=values))))


@cache
def leaves_before(*needed: tuple[str, Any]) -> dict[str, Any]:
    """The leaves without the key in question; most keys need no other one."""
    return config_leaves(dict(needed))


@cache
def config_with(mode: str) -> Trainer.Config:
    values = {"activation_checkpoint.mode": mode, "compile.enable": True}
    return trainer_config(Job(flavor=FLAVOR, values=values))


def host_type(path: str) -> Any:
    """The annotation of a field of the host's config; None below an untyped dict."""
    node: Any = config_with("memory_budget" if "memory_budget" in path else "selective")
    *parents, leaf = path.split(".")
    for parent in parents:
        if isinstance(node, dict):
            return None
        node = node[int(parent)] if isinstance(node, list) else getattr(node, parent)
    return None if isinstance(node, dict) else get_type_hints(type(node))[leaf]


def test_every_key_of_0_2_has_a_row():
    assert DEFAULTS_0_2.keys() - ROWS.keys() == set()


def test_a_row_beyond_0_2_is_marked():
    # A typing error in a name would be a key that nobody can ever set.
    new = {name for name, row in ROWS.items() if row.since_0_3}
    assert ROWS.keys() - DEFAULTS_0_2.keys() == new


def test_a_row_either_takes_a_value_or_says_why_not():
    for name, row in ROWS.items():
        assert (row.type is None) == bool(row.message), name
        assert (row.path is None) or row.type is not None, name
        assert not row.unless or row.message, name


@pytest.mark.parametrize("name", sorted(DEFAULTS_0_2.keys() - GONE.keys()))
def test_what_0_2_has_by_default_is_allowed(name: str):
    value = default_0_2(name)
    assert value is ... or accepts(ROWS[name], value)


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {HOPPER_ONLY}))
def test_a_key_changes_its_field_and_nothing_else(name: str):
    row, needed = FIELDS[name], NEEDED.get(name, {})
    before = leaves_before(*needed.items())
    assert row.path in before
    value = SAMPLES.get(name) or sample(row, before[row.path])
    after = config_leaves(needed | {name: value})
    changed = {path for path in before.keys() | after.keys() if before[path] != after[path]}
    followed = FOLLOWED_BY.get(name, set())
    assert changed == ({row.path} - {"training.mixed_precision_reduce"}) | followed  # has one value
    assert after[row.path] == value


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_hosts_field_has_a_type_that_takes_the_value(name: str):
    row = FIELDS[name]
    annotation = host_type(row.path)
    if annotation is not None:
        value = SAMPLES.get(name) or sample(row, object())
        TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_python(value)


# Fields that are called otherwise in 0.3, or that stand in a list or a dict.
CALLED_OTHERWISE = {
    "optimizer.name": "optimizer_name",
    "optimizer.beta1": "0",
    "optimizer.beta2": "1",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        "force_recompute_mm_shapes_by_fqns"
    ),
}


def test_a_key_sets_the_field_of_its_own_name():
    """Two that have changed places would each still set one field, and nothing else."""
    last_parts = {name: row.path.rpartition(".")[2] for name, row in FIELDS.items()}
    assert last_parts == {
        name: CALLED_OTHERWISE.get(name, name.rpartition(".")[2]) for name in FIELDS
    }


def test_no_two_keys_set_the_same_field():
    paths = [row.path for row in FIELDS.values()]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("name", sorted(GONE))
def test_a_key_that_is_gone_says_what_to_do(name: str, tmp_path: Path):
    section, _, key = name.rpartition(".")
    file = tmp_path / "job.toml"
    header = "" if section == "model" else f"[{section}]"
    file.write_text(f'[model]\nname = "ezpz_moe"\nflavor = "{FLAVOR}"\n{header}\n{key} = "any"\n')
    with pytest.raises(EzpzError) as error:
        load_job(file)
    assert str(error.value) == f"{file}: [{section}] {key}: {GONE[name].message}"
    assert any(verb in GONE[name].message for verb in ("Leave it out", "use ", "Set "))


def test_the_config_is_the_hosts_where_the_job_says_nothing():
    # The documented exceptions of ezpz_moe.hosts.titan.job, and no other.
    host = dict(leaves(Trainer.Config()))
    ours = config_leaves({})
    changed = {path for path in host if ours.get(path, ...) != host[path]}
    assert changed == {
        "training.disable_cuda_graphs",
        "checkpoint.last_save_model_only",
        "hf_assets_path",
        "optimizer.param_groups",
    } | {path for path in host if path.endswith("dataloader.dataset")}
