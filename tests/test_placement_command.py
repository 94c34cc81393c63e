"""``ezpz-moe place``: what it reads, reports, draws and refuses, and a run that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from dialect import DUMP_FOLDER, ON_0_2, job
from json_documents import documented
from telemetry_cases import layer, record
from trainer_runs import Runs, job_folder, telemetry

from ezpz_moe import cli
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.telemetry.json_lines import append
from ezpz_moe.tools.checkpoints.tensors import write_checkpoint
from ezpz_moe.tools.placement import report

FLAVOR = "debugmodel"
# In the first layer the first two of four ranks have everything; the second layer is even.
COUNTS = [[40, 40, 40, 40, 0, 0, 0, 0], [20] * 8]
LAYERS = range(1, 6)


def written(folder: Path, *records) -> Path:
    for each in records:
        append(folder / "telemetry.jsonl", each)
    return folder


def of_step(step: int, *counts, pairs=(), **changed):
    """A record of the debug model: layers 1 to 5, of which the last have the last counts."""
    counts = [*counts, *[counts[-1]] * (len(LAYERS) - len(counts))]
    layers = [
        layer(of, number=number, pairs=tuple(pairs), sampled_tokens=100)
        for number, of in zip(LAYERS, counts, strict=True)
    ]
    return record(*layers, step=step, **{"job": f"flavor {FLAVOR}"} | changed)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written(tmp_path / "run", of_step(10, *COUNTS), of_step(20, *COUNTS))


def found(capsys, *arguments: object) -> dict:
    assert cli.main(["place", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["place", *map(str, arguments)])
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


# Figures ------------------------------------------------------------------------------------------


def test_loads_before_and_after_are_those_of_the_records(run, capsys):
    first, second = found(capsys, run, "--ep", 4)["layers"][:2]
    assert first["before"] == {
        "max_over_mean": 2.0,
        "max_over_mean_of_records": 2.0,
        "rows": 8.0,  # 80 of 160 in a record of 10 steps
        "busiest": 0,
        "of_ranks": [2.0, 2.0, 0.0, 0.0],
        "pairs_on_node": None,
    }
    assert first["after"]["of_ranks"] == [1.0] * 4
    assert first["after"]["rows"] == 4.0
    assert first["least"] == 1.0
    # One expert of each of the first two ranks changes place with one of the others.
    assert first["moved"] == 4
    counts = np.array(COUNTS[0])[first["order"]]
    assert counts.reshape(4, 2).sum(1).tolist() == [40] * 4
    assert (second["moved"], second["order"]) == (0, list(range(8)))
    assert second["before"] == second["after"]


def test_a_step_waits_for_the_busiest_rank_of_its_own_record(tmp_path, capsys):
    """On the average two ranks are even, but in no record."""
    run = written(tmp_path, of_step(10, [9, 9, 1, 1] * 2), of_step(20, [1, 1, 9, 9] * 2))
    before = found(capsys, run, "--ep", 4)["layers"][0]["before"]
    assert before["max_over_mean"] == 1.0
    assert before["max_over_mean_of_records"] == 1.8
    assert before["rows"] == 1.8


def test_the_total_is_of_all_layers_and_a_held_out_half_has_its_own(tmp_path, capsys):
    """In the second half the two experts have everything that the first half's order joins."""
    even = [20] * 8
    first = written(tmp_path / "first", of_step(10, COUNTS[0], even))
    one, other = found(capsys, first, "--ep", 4)["layers"][0]["order"][:2]
    late = [80 * (expert in (one, other)) for expert in range(8)]
    run = written(tmp_path / "run", of_step(10, COUNTS[0], even), of_step(20, late, even))
    document = found(capsys, run, "--ep", 4)
    assert document.keys() == documented()["place"]
    assert document["rows_before"] == 8 + 4 * 4
    # Four layers have 40 rows of a rank in 10 steps.
    assert document["held_out"] == {"before": 8 + 16, "after": 16 + 16, "best": 8 + 16}


def test_the_last_steps_alone_count(tmp_path, capsys):
    run = written(tmp_path, *(of_step(step, COUNTS[step < 30]) for step in (10, 20, 30, 40)))
    assert found(capsys, run, "--ep", 4, "--last", 20)["layers"][0]["before"]["rows"] == 8
    document = found(capsys, run, "--ep", 4, "--last", 1)
    assert (document["first_step"], document["last_step"]) == (31, 40)
    assert document["held_out"] is None


def test_records_of_other_experts_do_not_count(tmp_path, capsys):
    before = record(*(layer([5] * 4, number=n) for n in LAYERS), job="flavor other")
    run = written(tmp_path, before, of_step(20, COUNTS[0]))
    document = found(capsys, run, "--ep", 4)
    assert (document["first_step"], document["layers"][0]["experts"]) == (11, 8)


def test_a_layer_that_gains_too_little_keeps_its_order(run, capsys):
    kept = found(capsys, run, "--ep", 4, "--min-gain", 0.51)["layers"][0]
    assert (kept["moved"], kept["after"]) == (0, kept["before"])
    assert found(capsys, run, "--ep", 4, "--min-gain", 0.5)["layers"][0]["moved"] == 4
    assert cli.main(["place", str(run), "--ep", "4", "--min-gain", "0.51"]) == 0
    said = "No order was found with a gain of at least 0.51 (--min-gain), so all layers keep theirs"
    assert said in capsys.readouterr().out


def test_a_layer_without_tokens_keeps_its_order(tmp_path, capsys):
    run = written(tmp_path, of_step(10, [0] * 8, COUNTS[0]))
    empty, full = found(capsys, run, "--ep", 4, "--plot", tmp_path / "drawn")["layers"][:2]
    assert (empty["moved"], empty["before"]["max_over_mean"]) == (0, None)
    assert full["moved"] == 4


@pytest.mark.parametrize("by", ["affinity", "both"])
def test_pairs_come_onto_one_node(tmp_path, capsys, by):
    """Experts 0 and 7 are one pair, 1 and 6 another one, and so on: two pairs fit on a node."""
    pairs = [(a, 7 - a, 10) for a in range(4)]
    run = written(tmp_path, of_step(10, [5] * 8, pairs=pairs), of_step(20, [5] * 8, pairs=pairs))
    flags = ("--ep", 4, "--ranks-per-node", 2, "--by", by)
    first = found(capsys, run, *flags)["layers"][0]
    assert (first["before"]["pairs_on_node"], first["after"]["pairs_on_node"]) == (0.0, 1.0)
    for node in np.reshape(first["order"], (2, 4)).tolist():
        assert sorted(7 - expert for expert in node) == sorted(node)
    kept = found(capsys, run, *flags[:-2], "--by", "load")["layers"][0]
    assert (kept["moved"], kept["after"]["pairs_on_node"]) == (0, 0.0)


# Words and pictures -------------------------------------------------------------------------------


def test_the_table_and_what_a_step_gains(run, capsys):
    assert cli.main(["place", str(run), "--ep", "4"]) == 0
    head, headings, first, second, *_, gain, held_out = capsys.readouterr().out.splitlines()
    assert head == "Steps 1 to 20 in 2 records, for 4 ranks:"
    cells = "layer moved busiest rank max / mean expected at best by record expected by record"
    assert headings.split() == cells.split()
    assert first.split() == ["1", "4", "of", "8", "0", "2.000", *["1.000"] * 2, "2.000", "1.000"]
    assert second.split()[:4] == ["2", "0", "of", "8"]
    assert gain == (
        "The busiest ranks of a step have 24 rows in all layers together, and would have 20: 16.7% "
        "fewer."
    )
    assert held_out.endswith("has in the second half 16.7% fewer; its own has 16.7% fewer.")


def test_the_picture_shows_each_rank_before_and_after(run, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    assert cli.main(["place", str(run), "--ep", "4", "--plot", str(drawn)]) == 0
    assert f"Drawn: {drawn / 'placement.png'}" in capsys.readouterr().out
    picture = matplotlib.image.imread(drawn / "placement.png")[..., :3]
    height, width, _ = picture.shape
    # A rank with twice the mean is red, an idle one black: both before, neither after.
    red = (picture[..., 0] > picture[..., 2] + 0.15) & (picture[..., 1] < 0.8)
    black = (picture < 0.02).all(-1)
    before, after = (slice(0, width // 3), slice(int(width * 0.4), int(width * 0.68)))
    cells = slice(int(height * 0.15), int(height * 0.5))
    assert red[cells, before].sum() > 1000
    assert black[cells, before].sum() > 1000 > 10 * black[cells, after].sum()
    assert not red[cells, after].sum()


def test_a_job_names_its_run_and_its_model(run, tmp_path, capsys):
    path = tmp_path / "job.toml"
    path.write_text(
        f'[job]\ndump_folder = "{run}"\n[model]\nname = "ezpz_moe"\nflavor = "{FLAVOR}"\n'
    )
    assert found(capsys, path, "--ep", 4)["records"] == str(run / "telemetry.jsonl")


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ep 3", "layer 1 has 8 experts, which 3 ranks cannot share equally."),
        ("--ep 0", "--ep 0: must be at least 1."),
        ("--ep 1", "--ep 1: one rank has all experts, in any order. Give at least 2."),
        ("--ep 4 --last 0", "--last 0: must be at least 1."),
        ("--ep 4 --min-gain 1", "--min-gain 1.0: must be a share"),
        ("--ep 4 --by both", "--by both: brings experts onto one node. Add --ranks-per-node."),
        ("--ep 4 --ranks-per-node 3", "--ranks-per-node 3: does not divide the 4 ranks"),
        ("--ep 4 --ranks-per-node 4 --by affinity", "all 4 ranks of --ep are on one node"),
        ("--ep 4 --ranks-per-node 2 --by both", "Set [telemetry] pairs = 1024 in the flavor"),
        ("--ep 4 --config 500M", "layer 1 has 8 experts, but 16 in flavor 500M."),
        ("only-one --ep 4", "only-one: name a checkpoint's folder and the folder to write"),
    ],
)
def test_what_does_not_fit_is_one_line(run, capsys, flags, said):
    assert said in refusal(capsys, run, *flags.split())


def test_records_that_name_no_job_need_one(tmp_path, capsys):
    gone = written(tmp_path / "gone", of_step(10, *COUNTS, job="my/gone.toml"))
    assert "name the job my/gone.toml, which is not there" in refusal(capsys, gone, "--ep", 4)
    old = written(tmp_path / "old", of_step(10, *COUNTS, job=""))
    assert "its records name no job" in refusal(capsys, old, "--ep", 4)
    assert found(capsys, old, "--ep", 4, "--config", FLAVOR)["layers"][0]["moved"] == 4


def test_experts_that_are_chosen_by_number_keep_theirs(run, tmp_path, capsys):
    (tmp_path / "turns.toml").write_text(
        f'inherits = "{FLAVOR}"\n[router]\nrouting = "balanced"\n[balance]\nbias_update = "none"\n'
    )
    text = f'[model]\nname = "ezpz_moe"\nflavor = "{FLAVOR}"\n'
    (tmp_path / "forced.toml").write_text(f"{text}[debug]\nmoe_force_load_balance = true\n")
    (tmp_path / "turned.toml").write_text(text.replace(FLAVOR, "turns"))
    for name, said in {"forced": "moe_force_load_balance", "turned": '"balanced"'}.items():
        assert said in refusal(capsys, run, "--ep", 4, "--config", tmp_path / f"{name}.toml")


def test_groups_of_the_flavor_stay_whole(tmp_path, capsys):
    (tmp_path / "grouped.toml").write_text(
        f'inherits = "{FLAVOR}"\nrouter_num_expert_groups = 4\nrouter_num_limited_groups = 2\n'
    )
    (tmp_path / "job.toml").write_text('[model]\nname = "ezpz_moe"\nflavor = "grouped"\n')
    run = written(tmp_path / "run", of_step(10, *COUNTS, job=""))
    flags = (run, "--config", tmp_path / "job.toml")
    # A rank is a group, and every order leaves it so; two ranks are two groups each.
    assert found(capsys, *flags, "--ep", 4)["layers"][0]["moved"] == 0
    order = found(capsys, *flags, "--ep", 2)["layers"][0]["order"]
    assert order != sorted(order)
    assert all(b == a + 1 for a, b in zip(order[::2], order[1::2], strict=True))


def test_another_model_than_the_runs_is_refused(run, tmp_path, capsys):
    """By its sizes, or by the host's model that it is."""
    (tmp_path / "wider.toml").write_text(f'inherits = "{FLAVOR}"\ndim = 128\n[rope]\ntheta = 5e5\n')
    for name, base in {"run's": "deepseek_v3", "other": "kimi_k2_7"}.items():
        (tmp_path / f"{name}.toml").write_text(f'base = "{base}/debugmodel"\n')
    for name in ("wider", "run's", "other"):
        text = f'[model]\nname = "ezpz_moe"\nflavor = "{name}"\n'
        (tmp_path / f"{name}.job.toml").write_text(text)
    job = tmp_path / "wider.job.toml"
    said = f"--config {job}: is another model than the run's, flavor {FLAVOR}: dim is 256 there"
    assert f"{said} and 128 here. Leave it out, " in refusal(
        capsys, run, "--ep", 4, "--config", job
    )
    own, other = (tmp_path / f"{name}.job.toml" for name in ("run's", "other"))
    of_base = written(tmp_path / "of_base", of_step(10, *COUNTS, job=str(own)))
    said = "base is 'deepseek_v3/debugmodel' there and 'kimi_k2_7/debugmodel' here"
    assert said in refusal(capsys, of_base, "--ep", 4, "--config", other)


@pytest.mark.skipif(ON_0_2, reason="torchtitan 0.2 does not say which experts its models have")
def test_a_model_of_the_hosts_with_other_experts_than_the_run_is_refused(tmp_path, capsys):
    (tmp_path / "of_eight.toml").write_text('base = "deepseek_v3/debugmodel"\n')
    (tmp_path / "job.toml").write_text('[model]\nname = "ezpz_moe"\nflavor = "of_eight"\n')
    run = written(tmp_path / "run", of_step(10, [1] * 4, job=""))
    said = refusal(capsys, run, "--ep", 4, "--config", tmp_path / "job.toml")
    assert "layer 1 has 4 experts, but 8 in flavor of_eight." in said


SMALL = f"""
inherits = "{FLAVOR}"
dim = 16
n_heads = 1
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
dense_hidden_dim = 16
moe_hidden_dim = 8
"""


class Saved:
    """A run of a small model, and the model's checkpoint."""

    def __init__(self, folder: Path) -> None:
        from ezpz_moe.hosts.detect import check_host, host

        check_host()
        (folder / "small.toml").write_text(SMALL)
        job = folder / "job.toml"
        job.write_text('[model]\nname = "ezpz_moe"\nflavor = "small"\n')
        self.run = written(folder / "run", of_step(20, *COUNTS, job=str(job)))
        model = host().build_on_meta(load_flavor("small", near=folder)).state_dict()
        self.tensors = {name: torch.zeros(each.shape) for name, each in model.items()}
        self.checkpoint = self.save(folder / "step-20")

    def save(self, folder: Path, **others: torch.Tensor) -> Path:
        folder.mkdir()
        write_checkpoint(folder, (self.tensors | others).items())
        return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def test_nothing_is_written_where_nothing_moves(saved, tmp_path, capsys):
    out = tmp_path / "out"
    said = refusal(capsys, saved.run, saved.checkpoint, out, "--ep", 4, "--min-gain", 0.9)
    assert (
        said == f"ezpz-moe: error: {out}: not written, because no expert would have another rank."
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("others", "out", "said"),
    [
        (None, "out", "step-30: there is no such folder."),
        ({}, "there", "there: already exists. Choose another folder, or remove it."),
        ({}, "there/file/out", "is not a folder."),
        ({"norm.weight": (8,)}, "out", "norm.weight is [8] in the checkpoint and [16] in the"),
        # A model that predicts further tokens: no flavor has one.
        (
            {"mtp_layers.0.moe.router.gate.weight": (8, 16)},
            "out",
            "mtp_layers.0.moe.router.gate.weight is [8, 16] in the checkpoint and nothing in the",
        ),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_computed(
    saved, tmp_path, capsys, monkeypatch, others, out, said
):
    monkeypatch.setattr(report, "place", lambda *_: pytest.fail("it was computed"))
    checkpoint = tmp_path / "step-30"
    if others is not None:
        saved.save(checkpoint, **{name: torch.zeros(size) for name, size in others.items()})
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert said in refusal(capsys, saved.run, checkpoint, tmp_path / out, "--ep", 4)


# A run that goes on -------------------------------------------------------------------------------


@pytest.mark.train
@pytest.mark.skipif(ON_0_2, reason="[telemetry] needs torchtitan 0.3 or later")
def test_a_run_goes_on_in_the_new_order(tmp_path, capsys):
    """The next step sends each expert's tokens to its new number, and its loss is what it was."""
    folder = job_folder(tmp_path)
    (folder / "watched.toml").write_text('inherits = "tiny"\n[telemetry]\npairs = 28\n')
    text = (folder / "job.toml").read_text().replace('"tiny_sdpa"', '"watched_sdpa"')
    (folder / "job.toml").write_text(text)
    flags = ("--checkpoint.enable", "--checkpoint.interval", "2", "--training.steps", "3")
    runs = Runs(folder)
    runs.add("run", job(folder / "job.toml", *flags))
    (kept,) = runs["run"]
    source, target = (folder / name / "checkpoint" / "step-2" for name in ("run", "placed"))
    arguments = (folder / "run", source, target, "--ep", 4, "--ranks-per-node", 2, "--by", "both")
    document = found(capsys, *arguments, "--min-gain", 0, "--config", folder / "job.toml")
    assert any(each["moved"] for each in document["layers"])
    runs.add("on", job(folder / "job.toml", *flags, DUMP_FOLDER, str(folder / "placed")))
    (placed,) = runs["on"]
    assert placed["losses"] == pytest.approx(kept["losses"][2:], rel=1e-5)
    last_of_kept, last_of_placed = (telemetry(folder, name)[-1] for name in ("run", "placed"))
    for order, old, new in zip(
        document["layers"], last_of_kept["layers"], last_of_placed["layers"], strict=True
    ):
        assert new["counts_E"] == [old["counts_E"][expert] for expert in order["order"]]
