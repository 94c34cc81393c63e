"""``[train_only]`` in real runs of the trainer: what is frozen keeps its bits, what learns learns.

Each run goes on from one checkpoint, with the moments of a run in which all learned, for ten steps:
as one rank; expert parallel, fully sharded and checkpointed, compiled or not; tensor parallel; by
more ranks than a layer has experts, of which FSDP shards the second dimension; in replicas.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dialect import LENGTH, ON_0_2, SINCE_2026_08
from torch.distributed.checkpoint import FileSystemReader
from trainer_runs import EP_2, Runs, at_once, door_1, job_folder

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

FLAVOR = """
inherits = "tiny"
n_layers = 3
n_heads = 4
num_experts = [8, 2]
router_top_k = [3, 1]
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
"""
LEARNS = {"1": [2, 0], "2": [1]}
TABLE = '[train_only]\nexperts = { "1" = [2, 0], "2" = [1] }\n'
SAME = ["--same-sequences", "--training.global-batch-size", "4"]
AOT = ["--compile.enable", "--compile.backend", "aot_eager"]
TP_2 = ["--parallelism.tensor-parallel-degree", "2"]
TOKENS = 4 * LENGTH
"""That a gradient adds up in float32, each addition with a rounding of 2**-24."""
SPLIT = "expert parallel, fully sharded, selective"
COMPILED = "compiled, expert parallel, fully sharded, selective"
TENSOR_PARALLEL = "tensor parallel"
MORE_RANKS = "expert parallel, fully sharded in the second dimension"
REPLICAS = "replicas, fully sharded in the second dimension"
REPLICATED_2 = ["--parallelism.data-parallel-replicate-degree", "2"]
BEFORE, AFTER = "step-3", "step-13"

pytestmark = [pytest.mark.train, pytest.mark.ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("train_only"))
    (folder / "some.toml").write_text(FLAVOR)
    hosts = FLAVOR.replace('"for_loop"\nexpert_precision = "float32"', '"grouped_mm"')
    (folder / "hosts.toml").write_text(hosts)
    return folder


def _saved(folder: Path, name: str) -> list[str]:
    return ["--checkpoint.enable", "--dump-folder", str(folder / name)]


def _only(folder: Path, name: str, table: str = TABLE, flavor: str = "some", **job) -> list:
    """Arguments that go on from the run in which all learned, with ``[train_only]``."""
    arguments = door_1(folder, flavor, *SAME, *_saved(folder, name), **job)
    path = next(Path(each) for each in arguments if each.endswith(".toml"))
    other = path.with_name(f"{name.replace(', ', '_').replace(' ', '_')}.toml")
    other.write_text(path.read_text() + table)
    load = ["--checkpoint.initial-load-path", str(folder / "all" / "checkpoint" / BEFORE)]
    load += ["--checkpoint.no-initial-load-model-only", "--training.steps", "13"]
    load += ["--checkpoint.exclude-from-loading", "dataloader"]  # its ranks were others
    return [str(other) if each == str(path) else each for each in arguments] + load


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    runs = Runs(folder)
    runs.add("all", door_1(folder, "some", *SAME, *_saved(folder, "all")))
    runs.add("one rank", _only(folder, "one rank"))
    runs.add("path of the host", _only(folder, "path of the host", flavor="hosts"))
    for name, compiled in ((SPLIT, []), (COMPILED, AOT)):
        split = _only(folder, name, checkpointing="selective")
        runs.add(name, [*split, *EP_2, *compiled], ranks=2)
    runs.add(TENSOR_PARALLEL, [*_only(folder, TENSOR_PARALLEL), *TP_2], ranks=2)
    runs.add(MORE_RANKS, [*_only(folder, MORE_RANKS), *EP_2, *at_once(1)], ranks=4)
    runs.add(REPLICAS, [*_only(folder, REPLICAS), *REPLICATED_2, *at_once(1)], ranks=4)
    gates = '[train_only]\nrouter = true\nexperts = { "2" = [1] }\nanchor = 0.5\n'
    runs.add("gates", _only(folder, "gates", gates))
    return runs


def _state(folder: Path, run: str, step: str) -> dict[str, torch.Tensor]:
    path = folder / run / "checkpoint" / step
    entries = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    return state


def _moved(folder: Path, run: str) -> dict[str, list[int]]:
    """Which rows of which parameters and buffers of the model ten steps have changed."""
    before, after = _state(folder, "all", BEFORE), _state(folder, run, AFTER)
    changed = {
        name: (before[name] != after[name]).flatten(1).any(1).nonzero().flatten().tolist()
        for name in before
        if name.startswith(("layers.", "tok_embeddings", "norm", "output", "lm_head"))
        and before[name].dim() > 1
    }
    flat = [name for name in before if name.startswith("layers.") and before[name].dim() < 2]
    changed |= {name: [0] for name in flat if not torch.equal(before[name], after[name])}
    assert len(changed) + len(flat) > 30
    return {name: rows for name, rows in changed.items() if rows}


STACKS = ("w1_EFD", "w2_EDF", "w3_EFD")


OF_RANKS = [
    SPLIT,
    # test_compiled_layers.py compiles a layer whose experts are frozen but for some.
    pytest.param(COMPILED, marks=pytest.mark.full),
    TENSOR_PARALLEL,
    MORE_RANKS,
    REPLICAS,
]
OF_EXPERTS = "layers.{}.moe.routed_experts.inner_experts.{}"


@pytest.mark.parametrize("run", ["one rank", "path of the host", *OF_RANKS])
def test_what_is_frozen_keeps_its_bits(runs, folder, run):
    _, record = runs["all"], runs[run][0]
    assert _moved(folder, run) == {
        OF_EXPERTS.format(layer, stack): sorted(experts)
        for layer, experts in LEARNS.items()
        for stack in STACKS
    }
    assert len(record["losses"]) == 10


@pytest.mark.parametrize(
    ("run", "of_eight", "of_two"),
    [
        # Into how many parts E and F of a stack [E, F, D] are cut, of eight experts and of two.
        (MORE_RANKS, (4, 1), (2, 2)),
        # Two ranks share a replica: the host counts all four, which are more than two experts.
        (REPLICAS, (2, 1), (1, 2)),
    ],
)
def test_fsdp_shards_the_second_dimension_of_few_experts(runs, folder, run, of_eight, of_two):
    """So that the runs above are about what they say."""
    _, _ = runs["all"], runs[run]
    reader = FileSystemReader(str(folder / run / "checkpoint" / AFTER))
    entries = reader.read_metadata().state_dict_metadata
    for layer, parts in zip(LEARNS, (of_eight, of_two), strict=True):
        entry = entries[OF_EXPERTS.format(layer, "w1_EFD")]
        shard = tuple(size // cut for size, cut in zip(entry.size, parts, strict=False))
        assert {tuple(chunk.sizes[:2]) for chunk in entry.chunks} == {shard}


@pytest.mark.parametrize("run", OF_RANKS)
def test_what_learns_learns_the_same_however_it_is_split(runs, run):
    _, one, other = runs["all"], runs["one rank"][0], runs[run][0]
    # Of gradients the norms: to load its states, the host takes a first step without any.
    norms, expected = (each["gradient_norms"] for each in (other, one))
    assert norms[0] == pytest.approx(expected[0], rel=TOKENS * 2.0**-24)
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_moments_of_frozen_rows_are_forgotten(runs, folder):
    _, _ = runs["all"], runs["one rank"]
    before, after = _state(folder, "all", BEFORE), _state(folder, "one rank", AFTER)
    moments = [name for name in after if "exp_avg" in name]
    assert len(moments) == 2 * len(STACKS) * len(LEARNS)
    for name in moments:
        experts = LEARNS[name.split(".layers.")[1][0]]
        rows = after[name].flatten(1).any(1).nonzero().flatten().tolist()
        assert rows == sorted(experts)
        assert before[name].flatten(1).any(1).sum() > len(experts)


def test_gates_learn_beside_an_expert(runs, folder):
    """And nothing else: neither the other experts nor the biases that choose."""
    _, _ = runs["all"], runs["gates"]
    gates = {f"layers.{layer}.moe.router.gate.weight" for layer in (1, 2)}
    moved = _moved(folder, "gates")
    assert moved.keys() - gates == {OF_EXPERTS.format(2, stack) for stack in STACKS}
    assert gates <= moved.keys()
