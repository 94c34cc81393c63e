"""Planning: what a cut holds is what preflight finds, and the arithmetic around it."""

import itertools
from dataclasses import replace

import pytest
from telemetry_cases import layer, record

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import DEBUG_VARIABLE, EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.hosts.model_sheet import ModelSheet
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(host()) is not Titan03:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.telemetry import json_lines
from ezpz_moe.tools import memory as described
from ezpz_moe.tools import preflight
from ezpz_moe.tools.planning import cuts, links, load, machine, memory, plans, steps
from ezpz_moe.tools.planning.cuts import Cut

DEBUG, GPT_OSS = "debugmodel_sdpa_for_loop", "gpt_oss_debugmodel_sdpa"
QWEN3 = "qwen3_debugmodel_sdpa"
_SHEETS: dict[str, ModelSheet] = {}


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "0")


def sheet_of(config: str) -> ModelSheet:
    if config not in _SHEETS:
        _SHEETS[config] = host().planning().model_sheet(config, [])
    return _SHEETS[config]


def layout(dp_shard=1, dp_replicate=1, tp=1, pp=1, ep=1) -> Cut:
    return Cut(dp_shard, dp_replicate, tp, pp, ep, 1, 1, "none")


@pytest.mark.parametrize("config", [DEBUG, GPT_OSS, QWEN3])
def test_flops_are_those_that_describe_counts(config):
    sheet = sheet_of(config)
    flavor = load_flavor(find_job(config).flavor)
    counted = host().anatomy().anatomy(flavor, sheet.job.seq_len)
    assert sheet.forward == pytest.approx(counted.total.forward, rel=1e-12)
    numbers = sum(memory.numel(w.shape) for part in sheet.parts.values() for w in part.weights)
    assert numbers == counted.total.parameters


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize(
    ("config", "cut", "stage"),
    [
        # More ranks than experts: their width is sharded.
        (DEBUG, layout(dp_shard=32, ep=4), 0),
        (DEBUG, layout(dp_shard=8, tp=2, ep=8), 0),
        # An uneven shard of everything, in the last stage.
        (DEBUG, layout(dp_shard=3, pp=4), 3),
        (GPT_OSS, layout(dp_shard=4, tp=2, ep=2), 0),
        # Replicas; all axes at once; and uneven shards of heads of two widths.
        (DEBUG, layout(dp_shard=4, dp_replicate=2, ep=2), 0),
        (DEBUG, layout(dp_shard=2, dp_replicate=2, tp=2, pp=2, ep=4), 1),
        (QWEN3, layout(dp_shard=3, tp=2), 0),
    ],
    ids=str,
)
def test_parameters_and_states_are_those_that_preflight_builds(config, cut, stage):
    built = _built(config, cut, stage)
    assert built.error == ""
    held = memory.states(sheet_of(config), cut)[stage]
    assert (held.parameters, held.states) == (built.parameters, built.state_bytes)


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize(
    # Replicas count as ranks too: 12 are more than the eight experts.
    "cut",
    [layout(dp_shard=48), layout(dp_shard=3, dp_replicate=4)],
    ids=str,
)
def test_experts_that_fsdp_cannot_share_evenly_are_refused_by_both(cut):
    assert "even" in _built(DEBUG, cut, 0).error
    assert [*cuts.problems(sheet_of(DEBUG), cut)] == [
        f"dp_shard={cut.dp_shard} with ep=1 cuts an expert's 256 rows into {cut.dp_shard}, which "
        "FSDP can do only evenly"
    ]


def _built(config, cut, stage):
    flags = {
        "data-parallel-replicate": cut.dp_replicate,
        "tensor-parallel": cut.tp,
        "pipeline-parallel": cut.pp,
        "expert-parallel": cut.ep,
    }
    words = [[f"--parallelism.{name}-degree", str(degree)] for name, degree in flags.items()]
    rank = stage * cut.ranks // cut.pp
    return preflight.in_a_process(
        preflight._run_rank, config, list(itertools.chain(*words)), cut.ranks, rank
    )


def test_stages_are_the_hosts():
    from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part

    sheet = sheet_of(DEBUG)
    for layers, pp, less in itertools.product((1, 3, 6, 61), range(1, 9), ((1, 1), (0, 2))):
        other = replace(sheet, n_layers=layers, job=replace(sheet.job, less_layers=less))
        try:
            theirs = _generate_llm_fqn_per_model_part(pp, layers, *less)
        except ValueError:
            theirs = None
        assert cuts.stages(other, pp) == theirs


def test_every_cut_uses_all_ranks_and_the_same_batch_and_the_list_is_whole():
    sheet = sheet_of(DEBUG)
    sheet = replace(sheet, job=replace(sheet.job, local_batch=2))
    found = list(cuts.legal_cuts(sheet, 8, ranks_per_node=4))
    assert len(set(found)) == len(found)
    assert {cut.ranks for cut in found} == {8}
    assert {cut.microbatch * cut.microbatches * cut.data_ranks for cut in found} == {16}
    layouts = {cut.layout for cut in found}
    # Among all degrees, these are what the rules leave: eight heads' divisors within a node, ...
    every = (
        layout(shard, replicas, tp, pp, ep)
        for shard, replicas, tp, pp, ep in itertools.product((1, 2, 4, 8), repeat=5)
        if shard * replicas * tp * pp == 8 and tp <= 4
    )
    assert layouts == {cut for cut in every if not [*cuts.problems(sheet, cut)]}
    assert {cut.tp for cut in layouts} == {1, 2, 4}
    assert {cut.ep for cut in layouts} == {1, 2, 4, 8}


def test_a_microbatch_of_three_is_looked_at_like_one_of_two():
    sheet = sheet_of(DEBUG)
    sheet = replace(sheet, job=replace(sheet.job, local_batch=3))
    found = [cut for cut in cuts.legal_cuts(sheet, 2, 2) if cut.data_ranks == 2]
    assert {cut.microbatch for cut in found} == {1, 3}
    found = cuts.legal_cuts(replace(sheet, job=replace(sheet.job, local_batch=66)), 1, 1)
    assert {cut.microbatch for cut in found} == {1, 2, 3, 6, 11, 22}


def test_a_batch_that_the_host_refuses_is_no_cut_of_the_jobs():
    sheet = sheet_of(DEBUG)
    sheet = replace(sheet, job=replace(sheet.job, local_batch=2, global_batch=5))
    found = plans.ranked(sheet, machine.machine("h100"), 2, 2, "balanced")
    assert found.own is None
    assert found.refused == "5 sequences are no multiple of 2 for each of 2 ranks"
    assert {row.cut.data_ranks for row in found.rows} == {1}


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (layout(tp=32), "tp=32 does not divide the 16 attention heads"),
        (layout(dp_shard=4, ep=8), "ep=8 does not divide the 4 ranks of dp_shard x tp"),
        (layout(dp_shard=16, ep=16), "ep=16 does not divide the 8 experts"),
        (layout(pp=16), "pp=16 does not fit 6 layers"),
    ],
)
def test_what_the_host_refuses_is_said(cut, words):
    assert words in list(cuts.problems(sheet_of(DEBUG), cut))


def test_more_checkpointing_keeps_less_and_a_pipeline_holds_several_microbatches():
    sheet = sheet_of(DEBUG)
    cut = replace(layout(dp_shard=2), microbatches=4)
    kept = [
        memory.fullest(sheet, replace(cut, checkpointing=mode)).activations
        for mode in ("full", "selective", "none")
    ]
    assert kept == sorted(set(kept))
    # Nothing is computed again.
    assert kept[-1] == int(memory.left_bytes(sheet, cut, 0))
    piped = replace(layout(pp=2), microbatches=4)
    alone = replace(piped, microbatches=1)
    one, several = (memory.fullest(sheet, each).activations for each in (alone, piped))
    assert 1.5 < several / one < 2  # the first stage holds two; the logits, once, are the last's


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_attention_that_is_written_out_holds_its_scores(mode):
    """What `describe` finds besides are queries and keys in float32, and what attention returns."""
    flags = ["--parallelism.tensor-parallel-degree=2", f"activation-checkpoint:{mode}"]
    built = preflight.in_a_process(described._activations, GPT_OSS, flags, 4, 0)
    measured = sum(n for place, n in built.bytes_by_place.items() if "attention scores" in place)
    sheet = sheet_of(GPT_OSS)
    fused = {name: replace(part, held_scores=0) for name, part in sheet.parts.items()}
    cut = replace(layout(dp_shard=2, tp=2), microbatch=sheet.job.local_batch, checkpointing=mode)
    with_scores, without = (
        memory.left_bytes(each, cut, 0) for each in (sheet, replace(sheet, parts=fused))
    )
    assert 0.9 < (with_scores - without) / measured < 1
    assert not any(part.held_scores for part in sheet_of(QWEN3).parts.values())


@pytest.mark.parametrize("imbalance", [1.0, 3.0])
@pytest.mark.parametrize("config", [DEBUG, GPT_OSS, QWEN3])
def test_more_checkpointing_never_holds_more(config, imbalance):
    """Also of a stage with one layer, whose recomputation counts as much as what it keeps."""
    sheet = sheet_of(config)
    sheet = replace(sheet, job=replace(sheet.job, local_batch=4))
    found = list(cuts.legal_cuts(sheet, 32, ranks_per_node=8))
    assert max(cut.pp for cut in found) > sheet.n_layers / 2
    for cut in found:
        if cut.checkpointing == "none":
            modes = (replace(cut, checkpointing=mode) for mode in ("full", "selective"))
            held = [memory.fullest(sheet, each, imbalance).total for each in (*modes, cut)]
            assert held == sorted(held), cut


MADE = machine.Machine(
    name="made up",
    ranks_per_node=4,
    compute={"bfloat16": 1e12, "float32": 1e11, "products": 0.5, "experts": 0.25, "attention": 1},
    memory={"size": 1e12, "bandwidth": 1e12},
    node={"bandwidth": 2e9, "achieved": 0.5, "latency": 1e-3},
    network={"bandwidth": 1e8, "achieved": 1, "latency": 1e-2},
    sources={},
)
"""1 GB/s in a node, 0.1 GB/s between nodes."""


@pytest.mark.parametrize(
    ("kind", "size", "stride", "expected"),
    [
        ("all-gather", 4, 1, 2 * 1e-3 + 0.75),
        ("all-reduce", 4, 1, 2 * (2 * 1e-3 + 0.75)),
        # Two of a node: the ring has both of their cards.
        ("reduce-scatter", 4, 2, 2 * 1e-2 + 0.75 * 1e9 / 2e8),
        ("all-to-all", 8, 1, 3 * 1e-2 + 0.5 * 1e9 / 1e8),
        ("send", 2, 4, 1e-2 + 10),
        ("send", 2, 2, 1e-3 + 1),
    ],
)
def test_the_time_of_a_gigabyte(kind, size, stride, expected):
    assert links.seconds(MADE, 4, kind, size, stride, 1e9) == pytest.approx(expected)


def test_a_pipeline_has_a_microbatch_for_every_stage():
    sheet = sheet_of(DEBUG)
    piped = [cut for cut in cuts.legal_cuts(sheet, 4, 4) if cut.pp > 1]
    assert piped
    assert all(cut.microbatches >= cut.pp for cut in piped)
    filled = replace(sheet, job=replace(sheet.job, schedule="GPipe"))
    assert any(cut.microbatches < cut.pp for cut in cuts.legal_cuts(filled, 4, 4))
    alone = replace(sheet, job=replace(sheet.job, degrees=replace(sheet.job.degrees, pp=4)))
    alone = replace(alone, job=replace(alone.job, global_batch=2, microbatch=1))
    found = plans.ranked(alone, machine.machine("h100"), 4, 4, "balanced")
    assert found.refused == "pp=4 needs as many microbatches, and there are 2"


def test_the_time_of_a_step_is_flops_over_rates_and_the_bubble():
    sheet = sheet_of(DEBUG)
    cut = replace(layout(pp=2), microbatches=3)
    time = steps.step_time(sheet, cut, MADE, 4, imbalance=1.5)
    tokens = 3 * sheet.job.seq_len
    slowest = memory.stage_parts(sheet, 2)[1]
    of_experts = sum(
        n * weight.forward
        for part, n in slowest.items()
        for weight in part.weights
        if weight.is_expert
    )
    seconds = 3 * of_experts * tokens / 1e12 / 0.25
    assert time.terms["routed experts"] == pytest.approx(seconds)
    assert time.terms["imbalance of the experts"] == pytest.approx(seconds / 2)
    rest = sum(s for name, s in time.terms.items() if name not in ("optimizer", "pipeline bubble"))
    assert time.terms["pipeline bubble"] == pytest.approx(rest / 3)
    assert time.worst == pytest.approx(sum(time.terms.values()))
    assert time.best <= time.predicted <= time.worst


def test_fsdp_hides_behind_computation_and_all_to_all_does_not():
    terms = {"dense products": 3.0, "FSDP: all-gather": 2.0, "experts: all-to-all": 1.0}
    time = steps._stage_time(layout(), dict(terms), MADE, 4.0)
    assert (time.best, time.predicted, time.worst) == (3, 4, 6)
    time = steps._stage_time(layout(), terms | {"FSDP: all-gather": 5.0}, MADE, 4.0)
    assert (time.best, time.predicted, time.worst) == (6, 6, 9)


def test_zipf_is_known_where_nothing_is_chance():
    harmonic = sum(1 / n for n in range(1, 9))
    assert load.zipf_imbalance(8, 8) == pytest.approx(8 / harmonic)
    assert load.zipf_imbalance(8, 1) == 1
    pairs = [
        load.max_over_mean([1 / n for n in order], 2)
        for order in itertools.permutations(range(1, 7))
    ]
    # 256 draws of a figure whose deviation is below 0.2.
    mean = sum(pairs) / len(pairs)
    assert load.zipf_imbalance(6, 2) == pytest.approx(mean, abs=4 * 0.2 / 256**0.5)


def test_distinct_ranks_by_counting():
    chosen = list(itertools.combinations(range(8), 3))
    mean = sum(len({expert // 2 for expert in each}) for each in chosen) / len(chosen)
    assert load.distinct_ranks(8, 3, ranks=4) == pytest.approx(mean)


def test_the_load_of_a_run_is_that_of_its_last_record_by_rank(tmp_path):
    json_lines.append(tmp_path / "telemetry.jsonl", record(layer((9, 1)), step=1, steps=1))
    json_lines.append(tmp_path / "telemetry.jsonl", record(layer((3, 1)), step=2, steps=1))
    assert load.loads(str(tmp_path)) == [(3, 1)]
    assert load.loads("balanced") is None
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "telemetry.jsonl").touch()
    with pytest.raises(EzpzError, match=r"none/telemetry\.jsonl holds no records yet"):
        load.loads(str(tmp_path / "none"))
    with pytest.raises(EzpzError, match=r"--load nowhere: is neither balanced nor zipf1"):
        load.loads("nowhere")
    assert load.rank_imbalance("run", [(3, 1, 0, 0), (1, 1, 1, 1)], 4, 2) == (2 + 1) / 2
    # Of a model whose layers differ, those that have as many experts.
    assert load.rank_imbalance("run", [(3, 1), (3, 1, 0, 0)], 2, 2) == 1.5
    with pytest.raises(EzpzError, match="the run had 4 experts in a layer, and this model has 8"):
        load.rank_imbalance("run", [(3, 1, 0, 0)], 8, 2)


@pytest.mark.parametrize("name", machine.names())
def test_every_figure_of_a_machine_has_a_source(name):
    known = machine.machine(name)
    assert {"bfloat16", "float32", "memory", "node", "network", "achieved"} == set(known.sources)


def test_a_wrong_machine_is_said_in_a_line(tmp_path):
    with pytest.raises(EzpzError, match=r"--machine 'h10'.* Did you mean 'h100'\?"):
        machine.machine("h10")
    text = (machine.FOLDER / "h100.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("products = 0.65", "products = 1.5"))
    with pytest.raises(EzpzError, match=r"mine.toml: compute.products = 1.5: .*less than"):
        machine.machine(str(path))
    path.write_text(text.replace("bandwidth = ", "bandwidth = inf # "))
    with pytest.raises(EzpzError, match=r"mine.toml: memory.bandwidth = inf: .*finite"):
        machine.machine(str(path))
