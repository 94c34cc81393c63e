"""Try what a resumed run may change, and write the table in docs/guides/checkpoints.md.

    python scripts/make_resume_table.py                  try everything, and rewrite the table
    python scripts/make_resume_table.py --only freeze    try the changes that contain the word

A tiny model trains for two steps before a change, and resumes for one step after it. Everything
takes five minutes of a core. If a run ends with a traceback, nothing is written: exit code 1.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tables
import tyro

sys.path.insert(0, str(tables.ROOT / "tests"))

import dialect
import trainer_runs

FAILS = "fails"
STEPS = 2
"""Steps before the change."""

_OURS = re.compile(r"WARNING - ezpz_moe: (?:\S+/step-\d+: )?(.*)\.$", re.MULTILINE)
_REFUSED = re.compile(r"ezpz-moe: error: (?:\S+/step-\d+: )?(.*)$", re.MULTILINE)
_UNRELATED = (
    "is untested",
    '= "partial_dtensor" for ',
    "drops tokens beyond",
    "drops what is beyond",
)


@dataclass(frozen=True)
class Setup:
    """What a run is told.

    Attributes:
        flavor: lines of the flavor's TOML, beyond the tiny model.
        job: key -> value of the job's TOML, beyond the tests' job.
        ranks: processes.
        computed_by: the end of the flavor's name.
    """

    flavor: str = ""
    job: tuple[tuple[str, Any], ...] = ()
    ranks: int = 1
    computed_by: str = ""


@dataclass(frozen=True)
class Change:
    """A change between a run and the one that resumes from it."""

    what: str
    before: Setup = field(default_factory=Setup)
    after: Setup = field(default_factory=Setup)


def job(ranks: int = 1, **values: Any) -> Setup:
    """Return a setup with keys of the job; a section ends at the first double underscore."""
    pairs = ((key.replace("__", ".", 1), value) for key, value in values.items())
    return Setup(job=tuple(pairs), ranks=ranks)


def router(lines: str) -> Setup:
    return Setup(flavor=f"[router]\n{lines}\n")


def balance(lines: str) -> Setup:
    return Setup(flavor=f"[balance]\n{lines}\n")


def both_ways(first: str, second: str, one: Setup, other: Setup) -> list[Change]:
    """Return the change from one setup to the other, and back."""
    return [
        Change(f"{first} to {second}", one, other),
        Change(f"{second} to {first}", other, one),
    ]


BALANCED = 'routing = "balanced"'
NO_BIAS = '[balance]\nbias_update = "none"'
RELU = 'routing = "relu"\nactivation = "relu_rmsnorm"'
NULL_EXPERTS = "null_experts = 2"
PADDING = "pad_token_id = 0"

ROUTER = [
    *both_ways(
        '`routing` = "topk"',
        '"balanced"',
        balance('bias_update = "none"'),
        router(f"{BALANCED}\n{NO_BIAS}"),
    ),
    *both_ways(
        '`routing` = "topk"',
        '"sinkhorn"',
        balance('bias_update = "none"'),
        router(f'routing = "sinkhorn"\n{NO_BIAS}'),
    ),
    Change("`freeze` = false to true", Setup(), router("freeze = true")),
    Change("`freeze` = true to false", router("freeze = true"), Setup()),
    Change("`jitter_noise`", Setup(), router("jitter_noise = true")),
    Change("`gate_precision`", Setup(), router('gate_precision = "float64"')),
    Change(
        "`temperature`, also a schedule: it is at its value of the step",
        Setup(),
        router("temperature = {start = 2.0, end = 1.0, steps = 4}"),
    ),
    Change("`activation`", Setup(), router('activation = "softplus"')),
    Change("`pad_token_id`", Setup(), router(PADDING)),
    Change("`padding`", router(PADDING), router(f'{PADDING}\npadding = "trailing"')),
    Change("`dispatch_padding`", router(PADDING), router(f"{PADDING}\ndispatch_padding = true")),
    Change("`keep_top1_score`", Setup(), router("keep_top1_score = true")),
    Change("`similarity`", Setup(), router("similarity = { strength = 0.5 }")),
    Change(
        "`learned_scale`: another weight",
        router(f"{RELU}\n{NO_BIAS}"),
        router(f"{RELU}\nlearned_scale = true\n{NO_BIAS}"),
    ),
    Change("`gating_residual` = false to true", Setup(), router("gating_residual = true")),
    Change("`gating_residual` = true to false", router("gating_residual = true"), Setup()),
    Change("`null_experts`: another gate", Setup(), router(NULL_EXPERTS)),
    Change("`copy_experts`: another gate", Setup(), router("copy_experts = 2")),
    Change("`constant_experts`: another gate", Setup(), router("constant_experts = 2")),
    Change("`null_experts` to `copy_experts`", router(NULL_EXPERTS), router("copy_experts = 2")),
    Change("`top_k`", router(NULL_EXPERTS), router(f"{NULL_EXPERTS}\ntop_k = 3")),
    Change(
        "`sinkhorn_tolerance`, `sinkhorn_iterations`",
        router(f'routing = "sinkhorn"\n{NO_BIAS}'),
        router(
            f'routing = "sinkhorn"\nsinkhorn_tolerance = 1e-2\nsinkhorn_iterations = 9\n{NO_BIAS}'
        ),
    ),
    Change(
        "`noise`, `skip_first_n_experts`",
        router(f"{BALANCED}\n{NO_BIAS}"),
        router(f"{BALANCED}\nnoise = 0.5\nskip_first_n_experts = 1\n{NO_BIAS}"),
    ),
]

BALANCE = [
    Change(
        "`aux_loss`, `mse_loss`, `z_loss`",
        Setup(),
        balance("aux_loss = 0.01\nmse_loss = 0.01\nz_loss = 0.001"),
    ),
    Change("`chunk_loss`", Setup(), balance("chunk_loss = 0.1")),
    Change("`chunk`", balance("chunk_loss = 0.1"), balance("chunk_loss = 0.1\nchunk = 16")),
    Change(
        "`locality_loss`",
        router(f"{RELU}\n{NO_BIAS}"),
        router(f"{RELU}\n{NO_BIAS}\nlocality_loss = 0.01"),
    ),
    Change("`scope`", balance("aux_loss = 0.01"), balance('aux_loss = 0.01\nscope = "batch"')),
    Change(
        "`sequence`, `batch`, `global`: losses of several scopes",
        balance("aux_loss = 0.01"),
        balance(
            "[balance.sequence]\naux_loss = 0.01\n"
            "[balance.batch]\nz_loss = 0.001\n[balance.global]\naux_loss = 0.01"
        ),
    ),
    Change(
        "`aux_loss_choice`",
        balance("aux_loss = 0.01"),
        balance('aux_loss = 0.01\naux_loss_choice = "routed"'),
    ),
    Change(
        "`capacity_factor`, `drop`, `min_capacity`",
        Setup(),
        balance('capacity_factor = 1.25\ndrop = "probability"\nmin_capacity = 4'),
    ),
    *both_ways(
        '`bias_update` = "none"',
        '"sign"',
        balance('bias_update = "none"'),
        balance('bias_update = "sign"'),
    ),
    Change(
        '`bias_update` = "sign" to "proportional", `bias_rate`',
        balance('bias_update = "sign"'),
        balance('bias_update = "proportional"\nbias_rate = 0.01'),
    ),
]

COMPUTED = [
    Change("`compute_backend`", Setup(), Setup(computed_by="_for_loop")),
    Change(
        "`compute_backend` with a capacity, which drops tokens",
        Setup(),
        Setup('compute_backend = "batched_mm_capacity(capacity_factor=1.0)"'),
    ),
    Change(
        "`expert_precision`",
        Setup(computed_by="_for_loop"),
        Setup('expert_precision = "float32"', computed_by="_for_loop"),
    ),
    *both_ways(
        '`routed` = "one_node"',
        '"composed"',
        Setup(computed_by="_for_loop"),
        Setup('routed = "composed"', computed_by="_for_loop"),
    ),
    Change("`[telemetry]`", Setup(), Setup("[telemetry]\nimages = false")),
    Change("fewer layers", Setup(), Setup("n_layers = 2")),
    Change("other sizes", Setup(), Setup("moe_hidden_dim = 32")),
]

JOB = [
    Change("`training.steps`", Setup(), job(training__steps=9)),
    Change(
        "`training.steps` after the last step",
        job(training__steps=STEPS),
        job(training__steps=STEPS + 1),
    ),
    Change(
        "`training.steps` with `lr_scheduler.total_steps` as it was",
        job(lr_scheduler__total_steps=9),
        job(training__steps=9, lr_scheduler__total_steps=9),
    ),
    Change("`optimizer.lr`", Setup(), job(optimizer__lr=2e-2)),
    Change(
        "`optimizer.weight_decay`, `beta1`, `beta2`, `eps`",
        Setup(),
        job(optimizer__weight_decay=0.2),
    ),
    Change("`optimizer.implementation`", Setup(), job(optimizer__implementation="foreach")),
    Change("`training.local_batch_size`", Setup(), job(training__local_batch_size=1)),
    Change("`training.seq_len`", Setup(), job(training__seq_len=64)),
    Change("`activation_checkpoint.mode`", Setup(), job(activation_checkpoint__mode="full")),
    Change(
        "from a step with the model alone",
        job(training__steps=STEPS, checkpoint__last_save_model_only=True),
        Setup(),
    ),
]

EP = {"parallelism__expert_parallel_degree": 2, "parallelism__spmd_backend": "partial_dtensor"}
START_OVER = {"checkpoint__exclude_from_loading": ["dataloader"]}

RANKS = [
    Change("1 rank to 2, FSDP", Setup(), Setup(ranks=2)),
    Change("1 rank to 2, FSDP, without the dataloader's state", Setup(), job(2, **START_OVER)),
    Change("2 ranks to 1", Setup(ranks=2), Setup()),
    Change("FSDP to FSDP with EP", Setup(ranks=2), job(2, **EP)),
    Change("FSDP with EP to FSDP", job(2, **EP), Setup(ranks=2)),
    Change(
        "FSDP to replicas (HSDP)",
        Setup(ranks=2),
        job(
            2,
            parallelism__data_parallel_replicate_degree=2,
            parallelism__data_parallel_shard_degree=1,
        ),
    ),
    Change("FSDP to TP", Setup(ranks=2), job(2, parallelism__tensor_parallel_degree=2)),
    Change("1 rank to TP", Setup(), job(2, parallelism__tensor_parallel_degree=2)),
    Change("1 rank to PP", Setup(), job(2, parallelism__pipeline_parallel_degree=2)),
    Change(
        "PP to TP",
        job(2, parallelism__pipeline_parallel_degree=2),
        job(2, parallelism__tensor_parallel_degree=2),
    ),
    Change("`spmd_backend`", Setup(ranks=2), job(2, parallelism__spmd_backend="full_dtensor")),
]

CHANGES: Mapping[str, list[Change]] = {
    "`[router]`": ROUTER,
    "`[balance]`": BALANCE,
    "the flavor": COMPUTED,
    "the job": JOB,
    "the ranks": RANKS,
}


class Trials:
    """Runs in one folder; each setup trains before a change once."""

    def __init__(self, folder: Path) -> None:
        self._folder = trainer_runs.job_folder(folder)
        self._trained: dict[Setup, Path] = {}
        self._numbers = itertools.count()  # runs of one name would share a port

    def result(self, change: Change) -> tuple[str, str]:
        """Return what came of a change, in a word and in the run's own words.

        Raises:
            AssertionError: the run before the change failed.
        """
        before = self._before(change.before)
        name = f"after.{next(self._numbers)}"
        shutil.copytree(before, self._folder / name)
        try:
            log = self._train(name, change.after)
        except AssertionError as failure:
            if refused := _REFUSED.search(str(failure)):
                return "**refused**", _first_sentence(refused[1])
            return FAILS, str(failure).strip().rpartition("\n")[2]
        finally:
            shutil.rmtree(self._folder / name)
        said = [note for note in dict.fromkeys(_OURS.findall(log)) if not _is_unrelated(note)]
        words = "; ".join(map(_first_sentence, said))
        return "resumes, with a note" if said else "resumes", words

    def _before(self, setup: Setup) -> Path:
        if setup not in self._trained:
            name = f"before.{len(self._trained)}"
            self._train(name, setup)
            self._trained[setup] = self._folder / name
            # One step more than it resumes from, to have the same schedule before and after.
            shutil.rmtree(self._folder / name / "checkpoint" / f"step-{STEPS + 1}", True)
        return self._trained[setup]

    def _train(self, name: str, setup: Setup) -> str:
        flavor = self._folder / "changed.toml"
        flavor.write_text(f'inherits = "tiny"\n{setup.flavor}\n')
        path = self._folder / f"{name}.job.toml"
        path.write_text(_job(self._folder / "job.toml", setup))
        trainer_runs.train({name: dialect.job(path)}, self._folder, ranks=setup.ranks)
        return (self._folder / trainer_runs.LOG).read_text()


def _job(base: Path, setup: Setup) -> str:
    """Return a job's TOML with the setup's keys."""
    sections = tomllib.loads(base.read_text())
    sections["model"]["flavor"] = f"changed_sdpa{setup.computed_by}"
    sections["training"]["steps"] = STEPS + 1
    sections["lr_scheduler"]["warmup_steps"] = 1  # so that the rate falls from the second step on
    sections["checkpoint"] = {"enable": True, "interval": 1}
    for key, value in setup.job:
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for section, keys in sections.items()
    )


def _is_unrelated(note: str) -> bool:
    return any(words in note for words in _UNRELATED)


def _first_sentence(words: str) -> str:
    return words.partition(". ")[0].removesuffix(".")


def rows(folder: Path, only: str) -> Iterator[dict[str, str]]:
    """Yield a row for each change that contains ``only``, and print it on the way."""
    trials = Trials(folder)
    for section, changes in CHANGES.items():
        for change in changes:
            if only in change.what:
                result, words = trials.result(change)
                print(f"{section}: {change.what}: {result}: {words}", flush=True)
                yield {"of": section, "change": change.what, "result": result, "it says": words}


def main(only: str = "") -> int:
    """Try what a resumed run may change, and write the table in docs/guides/checkpoints.md.

    Args:
        only: try the changes that contain this, and write nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        tried = list(rows(Path(folder, "runs"), only))
    if any(row["result"] == FAILS for row in tried):
        return 1
    if only:
        return 0
    return tables.update(
        "docs/guides/checkpoints.md", {"resume": tables.markdown(tried)}, check=False
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
