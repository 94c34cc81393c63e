"""Decide what becomes of each key of a job of torchtitan 0.2, or of a release before it.

A key that an older release had under another name is judged by its successor in 0.2
(:mod:`ezpz_moe.config.older_keys`), and moves there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any, Literal

from ezpz_moe.config.job import MODEL_NAME, accepts, allowed, is_one_of, likely, shown
from ezpz_moe.config.older_keys import OLDER_KEYS, OlderKey
from ezpz_moe.errors import did_you_mean
from ezpz_moe.hosts.titan.job_keys import KEYS
from ezpz_moe.hosts.titan_0_2.job_keys import (
    CHANGED_DEFAULTS,
    CONVERTERS,
    DATASETS,
    LOST_DEFAULTS,
    NO_EFFECT,
)
from ezpz_moe.tools.convert_model import NewModel

Fate = Literal["kept", "moved", "replaced", "added", "needless", "dropped", "differs", "open"]

_OLD_TOKENIZER = (
    "since torchtitan 0.2 it is [model] hf_assets_path, a folder with tokenizer.json: download "
    "that in place of tokenizer.model, and name its folder here"
)
_OF_A_CHECKOUT = (
    ": a folder of torchtitan's own checkout. Elsewhere name your tokenizer's, or leave this out "
    "with a debug model"
)
_LOSS_CHUNKS = 8  # torchtitan 0.3's default; 0.2 does not cut the loss
_AN_OLDER_FILE_HAD_NO = ("checkpoint.last_save_model_only",)
"""Changed defaults that releases before 0.2 did not have yet."""


@dataclass(frozen=True)
class Change:
    """What becomes of one key.

    Attributes:
        key: ``section.name``.
        value: in the old file; None for an added key, and 0.2's default for one that differs.
        fate: ``moved``: an older release's key, now another one. ``needless``: 0.3 does it anyway,
            or it had no effect in 0.2 either; ``dropped``: it had an effect. Neither is in the new
            file. ``differs``: in neither file, because 0.3 cannot be given 0.2's default.
            ``open``: the user has to fill it in; a run is refused before.
        note: 0.3's own name of the setting, the new value, or why there is none.
        new: the new value of a moved, replaced or added key; of an open one, what stays there.
        to: the key that a moved one has become, or an open one.
    """

    key: str
    value: Any
    fate: Fate
    note: str = ""
    new: Any = None
    to: str = ""

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def new_key(self) -> str:
        """The key in the new file."""
        return self.to or self.key


@dataclass(frozen=True)
class OldJob:
    """The values of an old file, ``section.name`` -> value, in the file's order."""

    given: Mapping[str, Any]

    @cached_property
    def claims(self) -> dict[str, str]:
        """Key of 0.2 -> the key of this file that says it: of several, its own, or the first."""
        claims = {key: key for key in self.given if key not in OLDER_KEYS}
        for key, value in self.given.items():
            older = OLDER_KEYS.get(key)
            if older and older.now and older.renewed(value) is not None:
                claims.setdefault(older.now, key)
        return claims

    @cached_property
    def values(self) -> dict[str, Any]:
        """The values by 0.2's names."""
        return {
            now: self.given[key] if now == key else OLDER_KEYS[key].renewed(self.given[key])
            for now, key in self.claims.items()
        }

    @property
    def is_older(self) -> bool:
        """Whether 0.2 itself would refuse it: it has keys of the releases before."""
        return any(key in OLDER_KEYS and key != "model.tokenizer_path" for key in self.given)

    def count(self, key: str, default: int) -> int:
        """Return a positive integer; the default for anything else, which nothing has checked."""
        value = self.values.get(key, default)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return value if is_count else default

    def switched_off(self, key: str) -> str:
        """Return the setting that makes ``key`` idle in 0.2, as ``name = value``; or nothing."""
        for prefix, other, default, off in NO_EFFECT:
            value = self.values.get(other, default)
            if key.startswith(prefix) and is_one_of(off, value):
                return f"{other} = {shown(value)}"
        section = key.rpartition(".")[0]
        named = self.values.get("model.converters", [])
        if section.startswith("quantize.") and isinstance(named, list):
            # A name that is no string names no converter.
            on = [CONVERTERS.get(each, ()) for each in named if isinstance(each, str)]
            if not any(section in sections for sections in on):
                return f"model.converters = {shown(named)}"
        return ""


def change_of(key: str, value: Any, job: OldJob, model: NewModel | None) -> Change:
    """Return what becomes of an assignment.

    Args:
        key: ``section.name``.
        value: its value.
        job: the file that it stands in.
        model: what the new job trains; None if it keeps its model.
    """
    if older := OLDER_KEYS.get(key):
        return _older(key, value, older, job)
    section, _, name = key.rpartition(".")
    row = KEYS.get(section, {}).get(name)
    if row is None:
        near = did_you_mean(name, likely(name, value, KEYS.get(section, {})))
        return Change(key, value, "dropped", f"torchtitan 0.2 and 0.3 have no such key.{near}")
    if model and key in ("model.name", "model.flavor"):
        return _model_change(key, value, model)
    # Before asking whether 0.3 has the key: a default that is built in needs none.
    if is_one_of(row.unless, value):
        return Change(key, value, "needless", "torchtitan 0.3 does it anyway")
    is_accepted = accepts(row, value)
    # In 0.3, an option of another mode of activation checkpointing is an error.
    may_be_idle = row.message or not is_accepted or section == "activation_checkpoint"
    if may_be_idle and (because := job.switched_off(key)):
        return Change(key, value, "needless", f"it has no effect with {because}")
    if row.message:
        note = _of_converters(value) if key == "model.converters" else ""
        return Change(key, value, "dropped", note or row.message)
    if key == "optimizer.name" and isinstance(value, str) and not is_accepted:
        return Change(key, value, "open", _of_optimizer(value, allowed(row)), value)
    if not is_accepted:
        return Change(key, value, "dropped", f"it must be {allowed(row)}")
    if model and name == "dataset" and value.lower() not in DATASETS:
        return Change(key, value, "open", _of_dataset(value), value)
    if model and key == "parallelism.expert_parallel_degree" and (problem := _ranks(value, model)):
        return Change(key, value, "open", problem, value)
    return Change(key, value, "kept", f"now {row.path}" if row.path not in (None, key) else "")


def _older(key: str, value: Any, older: OlderKey, job: OldJob) -> Change:
    """Return what becomes of a key of a release before 0.2."""
    if older.is_idle:
        return Change(key, value, "needless", older.note)
    if not older.now:
        if is_one_of(older.unless, value):
            return Change(key, value, "needless", "torchtitan 0.3 does it anyway")
        if because := job.switched_off(key):
            return Change(key, value, "needless", f"it has no effect with {because}")
        return Change(key, value, "dropped", older.note)
    new = older.renewed(value)
    if new is None:
        return Change(key, value, "dropped", f"now {older.place}: {older.note}")
    claim = job.claims[older.now]
    if claim != key:
        said = job.values[older.now]
        if is_one_of((said,), new):
            return Change(key, value, "needless", f"{claim} says the same")
        if claim == older.now:
            note = f"torchtitan 0.2 reads {claim} = {shown(said)} in its place"
            return Change(key, value, "needless", note)
        return Change(key, value, "dropped", f"{claim} = {shown(job.given[claim])} says otherwise")
    change = change_of(older.now, new, job, None)
    if change.fate == "kept":
        if key == "model.tokenizer_path" and new != value and value.endswith(".model"):
            return Change(key, value, "open", _OLD_TOKENIZER, new, older.now)
        note = f"now {older.place}" if new == value else f"now {older.place} = {shown(new)}"
        return Change(key, value, "moved", note, new, older.now)
    return replace(change, key=key, value=value, note=f"{older.place}: {change.note}")


def _of_optimizer(name: str, allowed_: str) -> str:
    # Left out, it would be AdamW with the learning rate of another.
    return (
        f"torchtitan 0.2 and 0.3 have no optimizer {shown(name)}, so it is a fork's: it must be "
        f"{allowed_}. Name one, and its own lr"
    )


def _of_dataset(name: str) -> str:
    return (
        f"torchtitan 0.2 and 0.3 have no dataset {shown(name)} ({', '.join(DATASETS)}): it is a "
        "fork's, or an older release's. Name one of these, or leave dataset out and set "
        "dataset_path to a file of texts"
    )


def _ranks(degree: int, model: NewModel) -> str:
    """Return why that many ranks cannot share the model's experts; nothing if they can."""
    experts = model.experts
    if experts is None or experts % degree == 0:
        return ""
    divisors = ", ".join(str(each) for each in range(1, experts + 1) if experts % each == 0)
    return (
        f"{degree} does not divide the {experts} experts of flavor {shown(model.flavor)}. Set it "
        f"to one of {divisors}"
    )


def _of_converters(named: Any) -> str:
    """Return what to know of converters that are not torchtitan's; nothing if all are."""
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        return ""
    known = [each for each in named if each in CONVERTERS]
    others = [each for each in named if each not in known]
    if not others:
        return ""
    quantizing = f"; {', '.join(map(shown, known))} quantizes" if known else ""
    return (
        f"{', '.join(map(shown, others))}: no converter of torchtitan's, so a fork's{quantizing}. "
        "A job for 0.3 has no key for converters, and nothing of this one is done: a package of "
        "yours can replace modules by an override instead ([override] imports)."
    )


def _model_change(key: str, value: Any, model: NewModel) -> Change:
    if model.refusal:
        return Change(key, value, "dropped", "no flavor matches this model")
    if key == "model.name":
        return Change(key, value, "replaced", f"by {shown(MODEL_NAME)}", MODEL_NAME)
    if model.open:
        return Change(key, value, "open", model.open)
    note = "; ".join([f"by {shown(model.flavor)}", *model.remarks])
    return Change(key, value, "replaced", note, model.flavor)


def added(job: OldJob, model: NewModel | None) -> Iterator[Change]:
    """Yield what the old file left to defaults that have changed since.

    Nothing for a job whose model is ours already, or if no new job can be written.
    """
    if model is None or model.refusal:
        return
    for key, (default, switch) in CHANGED_DEFAULTS.items():
        # A job that sets the key has made its choice. The switch: without it the default had no
        # effect.
        if key in job.values or not (switch is None or job.values.get(switch) is True):
            continue
        if key in _AN_OLDER_FILE_HAD_NO and job.is_older:
            continue
        if key == "model.flavor" and model.open:
            yield Change(key, None, "open", model.open)
            continue
        new = model.flavor if key == "model.flavor" else default
        where = _OF_A_CHECKOUT if key == "model.hf_assets_path" else ""
        note = f"torchtitan 0.2's default, {shown(default)}{where}"
        yield Change(key, None, "added", note, new)
    yield from _as_0_2_did(job, model)


def _as_0_2_did(job: OldJob, model: NewModel) -> Iterator[Change]:
    """Yield settings that 0.2 did not have, where 0.3's default refuses the job."""
    seq_len = job.count("training.seq_len", 2048)
    ranks = job.count("parallelism.context_parallel_degree", 1)
    if seq_len % (_LOSS_CHUNKS * ranks) and seq_len % ranks == 0:
        chunks = gcd(_LOSS_CHUNKS, seq_len // ranks)
        note = f"torchtitan 0.3 cuts the loss into {_LOSS_CHUNKS} chunks, 0.2 did not"
        yield Change("loss.num_chunks", None, "added", note, chunks)
    if ranks > 1 and model.attention == "sdpa":
        note = "torchtitan 0.2's own; SDPA takes context parallelism with no other"
        yield Change("parallelism.spmd_backend", None, "added", note, "partial_dtensor")


def differing(job: OldJob) -> Iterator[Change]:
    """Yield what the old file left to defaults that 0.3 cannot be given."""
    for key, (default, now) in LOST_DEFAULTS.items():
        if key not in job.values and not job.switched_off(key):
            yield Change(key, default, "differs", f"torchtitan 0.2's default; {now}")
