"""Convert a job of torchtitan 0.2 to one that torchtitan 0.3 trains with this package.

:func:`convert` decides for every key what becomes of it, and writes nothing. Each assignment of the
old file gets one :class:`Change`; so does what 0.2 did by default and 0.3 does not, which no line
of the file mentions. The new file consists of the old one's lines, each as its change has it;
additions follow the header of their section. The binding's table ``hosts/titan/job_keys.py`` says
what a key is in 0.3, and ``hosts/titan_0_2/moe_models.py`` what a model is. No host is imported:
any may be installed, or none.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import MODEL_NAME, accepts, allowed, is_one_of, shown
from ezpz_moe.config.keys import sections
from ezpz_moe.config.toml import read_toml
from ezpz_moe.config.toml_edit import Statement, assignment, commented, statements
from ezpz_moe.errors import EzpzError, did_you_mean
from ezpz_moe.hosts.setting import flat
from ezpz_moe.hosts.titan.job_keys import KEYS
from ezpz_moe.hosts.titan_0_2.job_keys import CHANGED_DEFAULTS, LOST_DEFAULTS, NO_EFFECT
from ezpz_moe.tools.convert_model import NewModel, new_model

Fate = Literal["kept", "replaced", "added", "needless", "dropped", "differs"]

_DEFAULT_MODEL = "llama3"  # torchtitan 0.2's default, like the next one
_DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class Change:
    """What becomes of one key.

    Attributes:
        key: ``section.name``.
        value: in the old file; None for an added key, and 0.2's default for one that differs.
        fate: ``needless``: 0.3 does it anyway, or it had no effect in 0.2 either; ``dropped``: it
            had an effect. Neither is in the new file. ``differs``: in neither file, because 0.3
            cannot be given 0.2's default.
        note: 0.3's own name of the setting, the new value, or why there is none.
        new: the new value of a replaced or added key.
    """

    key: str
    value: Any
    fate: Fate
    note: str = ""
    new: Any = None

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` found.

    Attributes:
        changes: one per key, in the file's order; then the added keys, and those that differ.
        text: the new job.
        flavor: the name in its ``model.flavor``.
        flavor_file: text of the flavor file that it needs beside it; empty for none.
        refusal: why there is no such job; empty if there is one.
    """

    changes: tuple[Change, ...]
    text: str
    flavor: str
    flavor_file: str = ""
    refusal: str = ""

    @property
    def dropped(self) -> list[str]:
        """Keys that had an effect and no longer have one."""
        return [change.key for change in self.changes if change.fate == "dropped"]


def convert(old: Path, new: Path) -> Conversion:
    """Return what torchtitan 0.3 accepts from a job of torchtitan 0.2.

    Args:
        old: the job's TOML.
        new: where the new job would go; nothing is written.

    Raises:
        EzpzError: ``old`` cannot be read, is not TOML, or has a section in one line.
    """
    values = dict(flat(read_toml(old)))
    model = _new_model(values, flavor_path(new).stem)
    lines = list(_changed_lines(old, values, model))
    added = list(_added(values, model))
    changes = (*(change for _, change in lines if change), *added, *_differing(values))
    text = _rendered(lines, added, old.name)
    if model is None:  # its model is this package's already, and keeps its flavor
        flavor = values.get("model.flavor")
        return Conversion(changes, text, flavor if isinstance(flavor, str) else "")
    return Conversion(changes, text, model.flavor, model.file, model.refusal)


def flavor_path(new: Path) -> Path:
    """Return where a new job's flavor file goes. No other job uses this name."""
    return new.with_name(f"{new.stem}_model.toml")


def write(conversion: Conversion, new: Path) -> list[Path]:
    """Write the new job and the flavor file that it needs beside it; return their paths.

    Raises:
        EzpzError: there is no such job, its flavor cannot be found from there, or a file already
            exists or cannot be written. Nothing is left behind then.
    """
    if conversion.refusal:
        raise EzpzError(f"{new} was not written: {conversion.refusal}")
    if new.suffix != ".toml":
        raise EzpzError(f"{new}: a job's name must end in .toml, which tells it from a flavor's.")
    if not conversion.flavor_file:
        # No flavor file is written, so the named flavor must be found from the job's new folder.
        load_flavor(conversion.flavor, near=new.parent)
    files = {flavor_path(new): conversion.flavor_file, new: conversion.text}
    files = {path: text for path, text in files.items() if text}  # the job needs the flavor: last
    return write_files(files, new)


def write_files(files: Mapping[Path, str], new: Path) -> list[Path]:
    """Write all of the files, in this order, or none; ``new`` is the one to name in a message.

    Raises:
        EzpzError: one exists already, or cannot be written.
    """
    for path in files:
        if path.exists():
            raise EzpzError(f"{path} already exists. Remove it, or choose another name.")
    try:
        # Write both files before moving either: a full disk then leaves nothing behind. In the same
        # folder, because os.replace cannot move a file to another file system.
        with tempfile.TemporaryDirectory(prefix=".ezpz-moe-", dir=new.parent) as folder:
            for path, text in files.items():
                # newline="": the text has the line endings of the old file already.
                Path(folder, path.name).write_text(text, encoding="utf-8", newline="")
            for path in files:
                os.replace(Path(folder, path.name), path)
    except OSError as error:
        raise EzpzError(f"{new} cannot be written: {error}.") from error
    return list(files)


# Keys ---------------------------------------------------------------------------------------------


def _new_model(values: Mapping[str, Any], name: str) -> NewModel | None:
    """Return what the job trains; None if its model is already this package's."""
    model = values.get("model.name", _DEFAULT_MODEL)
    if model == MODEL_NAME:
        return None
    # A job that names no size got 0.2's default, which the new one has to train too.
    flavor = values.get("model.flavor", CHANGED_DEFAULTS["model.flavor"][0])
    seq_len = values.get("training.seq_len", _DEFAULT_SEQ_LEN)
    return new_model(model, flavor, seq_len=seq_len, name=name)


def _changed_lines(
    old: Path, values: Mapping[str, Any], model: NewModel | None
) -> Iterator[tuple[Statement, Change | None]]:
    """Yield the old file's statements, and for assignments, what becomes of them."""
    # As bytes: read_text() would make one kind of line ending of both.
    for line in statements(old.read_bytes().decode("utf-8-sig")):
        yield line, _change(*_assigned(line, old), values, model) if line.is_assignment else None


def _assigned(line: Statement, old: Path) -> tuple[str, Any]:
    """Return ``section.name`` and value of an assignment."""
    found = list(flat(line.parsed, line.section))
    if len(found) != 1:
        raise EzpzError(
            f"{old}: {line.text.strip()}: is not one key with one value. Write each key on a "
            "line of its own, under its [section]."
        )
    return found[0]


def _change(key: str, value: Any, values: Mapping[str, Any], model: NewModel | None) -> Change:
    section, _, name = key.rpartition(".")
    row = KEYS.get(section, {}).get(name)
    if row is None:
        near = did_you_mean(name, KEYS.get(section, {}))
        return Change(key, value, "dropped", f"torchtitan 0.2 and 0.3 have no such key.{near}")
    if model and key in ("model.name", "model.flavor"):
        return _model_change(key, value, model)
    # Before asking whether 0.3 has the key: a default that is built in needs none.
    if is_one_of(row.unless, value):
        return Change(key, value, "needless", "torchtitan 0.3 does it anyway")
    # In 0.3, an option of another mode of activation checkpointing is an error.
    may_be_idle = row.message or section == "activation_checkpoint"
    if may_be_idle and (because := _switched_off(key, values)):
        return Change(key, value, "needless", f"it has no effect with {because}")
    if row.message:
        return Change(key, value, "dropped", row.message)
    if not accepts(row, value):
        return Change(key, value, "dropped", f"it must be {allowed(row)}")
    return Change(key, value, "kept", f"now {row.path}" if row.path not in (None, key) else "")


def _model_change(key: str, value: Any, model: NewModel) -> Change:
    if model.refusal:
        return Change(key, value, "dropped", "no flavor matches this model")
    if key == "model.name":
        return Change(key, value, "replaced", f"by {shown(MODEL_NAME)}", MODEL_NAME)
    note = "; ".join([f"by {shown(model.flavor)}", *model.remarks])
    return Change(key, value, "replaced", note, model.flavor)


def _switched_off(key: str, values: Mapping[str, Any]) -> str:
    """Return the setting that makes ``key`` idle in 0.2, as ``name = value``; or nothing."""
    for prefix, other, default, off in NO_EFFECT:
        value = values.get(other, default)
        if key.startswith(prefix) and is_one_of(off, value):
            return f"{other} = {shown(value)}"
    return ""


def _added(values: Mapping[str, Any], model: NewModel | None) -> Iterator[Change]:
    """Yield what the old file left to defaults that have changed since.

    Nothing for a job whose model is ours already, or if no new job can be written.
    """
    if model is None or model.refusal:
        return
    for key, (default, switch) in CHANGED_DEFAULTS.items():
        # A job that sets the key has made its choice. The switch: without it the default had no
        # effect.
        if key not in values and (switch is None or values.get(switch) is True):
            new = model.flavor if key == "model.flavor" else default
            yield Change(key, None, "added", f"torchtitan 0.2's default, {shown(default)}", new)


def _differing(values: Mapping[str, Any]) -> Iterator[Change]:
    """Yield what the old file left to defaults that 0.3 cannot be given."""
    for key, (default, now) in LOST_DEFAULTS.items():
        if key not in values and not _switched_off(key, values):
            yield Change(key, default, "differs", f"torchtitan 0.2's default; {now}")


# The new file -------------------------------------------------------------------------------------


def _rendered(
    lines: Sequence[tuple[Statement, Change | None]], added: Sequence[Change], source: str
) -> str:
    """Return the old file's statements, with the changes made."""
    text = f"# From {source} of torchtitan 0.2, by ezpz-moe convert.\n\n"
    missing: dict[str, list[Change]] = {}
    for change in added:
        missing.setdefault(change.section, []).append(change)
    # Sections stay in the user's order: the new file should look like the old one.
    for _, block in groupby(lines, key=lambda pair: pair[0].section):
        text += "".join(_rendered_section(list(block), missing))
    # Sections that the old file lacks go to the end.
    for section, changes in missing.items():
        text += f"\n[{section}]\n" + "".join(_assignment(each, section) for each in changes)
    return text


def _rendered_section(
    block: Sequence[tuple[Statement, Change | None]], missing: dict[str, list[Change]]
) -> Iterator[str]:
    """Yield the lines of one section; if nothing is left of it, only the user's comments.

    What the section lacks follows its header, or its first key if it has no header, and is removed
    from ``missing``.
    """
    section = block[0][0].section
    fates = {change.fate for _, change in block if change}
    # `lives`: the header stays. `is_read`: so do comments and blank lines, for whoever reads on.
    is_empty = not fates and section in sections(KEYS) | {""}
    lives = is_empty or section in missing or bool(fates & {"kept", "replaced"})
    is_read = lives or "dropped" in fates or any(line.is_comment for line, _ in block)
    for line, change in block:
        if change:
            yield _rendered_key(line, change)
        elif line.is_header:
            yield line.text if lives else commented(line.text) if "dropped" in fates else ""
        elif is_read:
            yield line.text
        if change or line.is_header:
            for added in missing.pop(change.section if change else section, ()):
                yield _assignment(added, section)


def _rendered_key(line: Statement, change: Change) -> str:
    match change.fate:
        case "kept":
            return line.text
        case "replaced":
            return _assignment(change, line.section)
        case "needless":
            return ""
        case _:
            return commented(f"dropped: {change.note}\n{line.text}")


def _assignment(change: Change, section: str) -> str:
    """Return a replaced or added key, as written under the header ``section``."""
    was = change.note if change.fate == "added" else f"was {shown(change.value)}"
    return assignment(change.key.removeprefix(f"{section}."), change.new, was)
