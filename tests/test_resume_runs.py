"""Real runs that resume: after their end, with other settings, and beside a full disk."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import dialect
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from trainer_runs import LOG, job_folder, train

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(dialect.ON_0_2, reason="torchtitan 0.2 has no checkpointer of ours"),
]

BIAS = "layers.1.moe.expert_bias_E"
GATE = "layers.1.moe.router.gate.weight"
FLAVORS = {
    "sign": '[balance]\nbias_update = "sign"\nbias_rate = 0.3',
    "balanced": '[router]\nrouting = "balanced"\n[balance]\nbias_update = "none"',
}


class Trained:
    """Runs below one folder, each of which may resume from a copy of another."""

    def __init__(self, folder: Path) -> None:
        self.folder = job_folder(folder)
        for name, lines in FLAVORS.items():
            (folder / f"{name}.toml").write_text(f'inherits = "tiny"\n{lines}\n')

    def train(self, name: str, flavor: str, steps: int, *, ranks: int = 1, **changes: str) -> str:
        """Train, and return what the run said.

        Args:
            changes: lines for a section of the job.
        """
        text = (self.folder / "job.toml").read_text() + "[checkpoint]\n[parallelism]\n"
        text = text.replace('"tiny_sdpa"', f'"{flavor}_sdpa"')
        text = text.replace("steps = 3", f"steps = {steps}")
        checkpoint = "enable = true\ninterval = 1\n" + changes.pop("checkpoint", "")
        for section, lines in {"checkpoint": checkpoint, **changes}.items():
            text = text.replace(f"[{section}]", f"[{section}]\n{lines}")
        path = self.folder / f"{name}.job.toml"
        path.write_text(text)
        train({name: dialect.job(path)}, self.folder, ranks=ranks)
        return (self.folder / LOG).read_text()

    def resume(self, name: str, source: str, *arguments, **more) -> str:
        shutil.copytree(self.folder / source, self.folder / name)
        return self.train(name, *arguments, **more)

    def refused(self, name: str, *arguments, **more) -> str:
        """Resume, and return the one line that the run ended with."""
        with pytest.raises(AssertionError) as failure:
            self.resume(name, *arguments, **more)
        return one_line(failure.value)

    def step(self, name: str, step: int) -> Path:
        return self.folder / name / "checkpoint" / f"step-{step}"

    def entries(self, name: str, step: int) -> dict:
        return FileSystemReader(self.step(name, step)).read_metadata().state_dict_metadata

    def tensor(self, name: str, step: int, entry: str) -> torch.Tensor:
        saved = self.entries(name, step)[entry]
        tensors = {entry: torch.empty(saved.size, dtype=saved.properties.dtype)}
        dcp.load(tensors, checkpoint_id=self.step(name, step), no_dist=True)
        return tensors[entry]


def one_line(failure: AssertionError) -> str:
    """What a run of ours said last, which has no traceback."""
    said = str(failure)
    assert "Traceback" not in said
    (line,) = set(re.findall(r"^ezpz-moe: error: (.*)$", said, re.MULTILINE))
    return line


def notes(log: str) -> list[str]:
    """What the run said about the checkpoint, without its folder."""
    found = re.findall(r"WARNING - ezpz_moe: (?:/.*/step-\d+: )?(.*)\.$", log, re.MULTILINE)
    return [note for note in found if "is untested" not in note]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def ended(runs) -> str:
    """A run of three steps after its last: the name of its folder."""
    runs.train("ended", "sign", 3)
    return "ended"


@pytest.fixture(scope="module")
def prolonged(runs, ended) -> str:
    """What that run says when it goes on for two steps, with another weight decay."""
    return runs.resume("prolonged", ended, "sign", 5, optimizer="weight_decay = 0.3")


def test_a_finished_run_can_be_prolonged(runs, prolonged) -> None:
    assert "Training starts at step 4" in prolonged
    assert runs.step("prolonged", 5).is_dir()


def test_a_longer_run_says_both_learning_rates_and_what_the_checkpoint_keeps(prolonged) -> None:
    kept, rates = notes(prolonged)
    assert kept == (
        "the optimizer keeps weight_decay = 0.1 from the checkpoint: this job's 0.3 has no effect "
        "on a resumed run"
    )
    assert rates.startswith(
        "the learning rate of step 4 is 0 in the run that saved the checkpoint and 0.00666667 in "
        "this job's schedule, which holds from step 5 on: "
    )


def test_the_first_step_has_the_saved_rate(runs, prolonged) -> None:
    """As docs/guides/checkpoints.md and the message say: it was zero after the last step."""
    third, fourth, fifth = (runs.tensor("prolonged", step, GATE) for step in (3, 4, 5))
    assert torch.equal(fourth, third)
    assert not torch.equal(fifth, fourth)


@pytest.fixture(scope="module")
def balanced(runs) -> str:
    """A run whose gate is not trained, and without a bias."""
    runs.train("balanced", "balanced", 2)
    return "balanced"


def test_a_balanced_run_resumes(runs, balanced) -> None:
    """Its gate has no gradient, and so no state in an optimizer."""
    log = runs.resume("balanced again", balanced, "balanced", 3)
    assert "Training starts at step 3" in log
    assert notes(log) == []
    assert not [name for name in runs.entries("balanced again", 3) if f".{GATE}." in name]


def test_a_bias_and_a_gate_begin_where_there_were_none(runs, balanced) -> None:
    bias, gate = notes(runs.resume("awake", balanced, "sign", 3))
    assert bias == f"the checkpoint has no {BIAS} and 1 more: a selection bias begins at zero"
    assert (
        gate == f"the checkpoint has no optimizer state of {GATE} and 1 more, which begins afresh"
    )
    bias_E = runs.tensor("awake", 3, BIAS)
    assert 0 < bias_E.abs().max() < 0.61  # one step of 0.3 from zero, less the mean's
    of_gate, of_head = (f"optimizer.state.{name}.step" for name in (GATE, "lm_head.weight"))
    assert runs.tensor("awake", 3, of_gate) == 1
    assert runs.tensor("awake", 3, of_head) == 3


@pytest.fixture(scope="module")
def exported(runs) -> str:
    """A run whose last step is the model alone, in bfloat16."""
    last = 'last_save_model_only = true\nexport_dtype = "bfloat16"\n'
    runs.train("exported", "sign", 3, checkpoint=last)
    return "exported"


def test_an_exported_bias_is_not_rounded(runs, exported) -> None:
    bias_E, gate_ED = (runs.tensor(exported, 3, name) for name in (BIAS, GATE))
    assert gate_ED.dtype == torch.bfloat16
    assert bias_E.dtype == torch.float32
    assert not torch.equal(bias_E.bfloat16().float(), bias_E), "this bias would not be rounded"


def test_the_model_alone_names_the_step_to_resume_from(runs, exported) -> None:
    said = runs.refused("from weights", exported, "sign", 4)
    assert said.startswith(f"{runs.step('from weights', 3)}: holds the model alone")
    assert "is step-2: resume with --checkpoint.load_step 2" in said


@pytest.mark.ranks
def test_another_number_of_data_parallel_ranks_names_the_remedy(runs, ended) -> None:
    said = runs.refused("two ranks", ended, "sign", 4, ranks=2)
    assert "of 1 data-parallel rank(s), and this run has 2" in said
    assert "--checkpoint.exclude_from_loading dataloader" in said


@pytest.mark.ranks
@pytest.mark.full
def test_the_stages_of_a_pipeline_lack_and_miss_different_layers(runs, balanced) -> None:
    stages = "pipeline_parallel_degree = 2"
    log = runs.resume("pipeline", balanced, "sign", 3, ranks=2, parallelism=stages)
    bias, gate = dict.fromkeys(notes(log))  # each rank says the same
    assert f"no {BIAS} and 1 more" in bias
    assert f"no optimizer state of {GATE} and 1 more" in gate
    steps = [
        runs.tensor("pipeline", 3, f"optimizer.state.layers.{layer}.moe.router.gate.weight.step")
        for layer in (1, 2)
    ]
    assert steps == [1, 1]


@pytest.mark.parametrize(
    ("mode", "ranks"),
    [
        ("disabled", 1),
        pytest.param("async", 1, marks=pytest.mark.full),
        pytest.param("disabled", 2, marks=[pytest.mark.full, pytest.mark.ranks]),
    ],
)
def test_a_full_disk_ends_a_run_in_one_line(runs, mode, ranks) -> None:
    """The last rank's file of step 2 is one that takes no byte."""
    name = f"full {mode} {ranks}"
    runs.step(name, 2).mkdir(parents=True)
    (runs.step(name, 2) / f"__{ranks - 1}_0.distcp").symlink_to("/dev/full")
    with pytest.raises(AssertionError) as failure:
        runs.train(name, "tiny", 4, ranks=ranks, checkpoint=f'async_mode = "{mode}"')
    said = one_line(failure.value)
    assert said.startswith(f"{runs.step(name, 2)}: the checkpoint could not be written: No space")
    assert "GiB are free there. The newest whole checkpoint is step-1: make room" in said
    assert [each.name for each in runs.step(name, 2).parent.iterdir()] == ["step-1"]
