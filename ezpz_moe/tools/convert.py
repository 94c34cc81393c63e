"""Convert a job of torchtitan 0.2 to one that torchtitan 0.3 trains with this package.

:func:`convert` decides for every key what becomes of it, and writes nothing. Each assignment of the
old file gets one :class:`Change` (:mod:`.convert_keys`); so does what 0.2 did by default and 0.3
does not, which no line of the file mentions. The new file consists of the old one's lines, each as
its change has it; additions follow the header of their section. The binding's table
``hosts/titan/job_keys.py`` says what a key is in 0.3, and ``hosts/titan_0_2/moe_models.py`` what a
model is. No host is imported: any may be installed, or none.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import MODEL_NAME, shown
from ezpz_moe.config.keys import sections
from ezpz_moe.config.toml import read_toml
from ezpz_moe.config.toml_edit import Statement, assignment, commented, statements
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.setting import flat
from ezpz_moe.hosts.titan.job_keys import KEYS
from ezpz_moe.hosts.titan_0_2.job_keys import CHANGED_DEFAULTS
from ezpz_moe.tools.convert_keys import Change, OldJob, added, change_of, differing
from ezpz_moe.tools.convert_model import NewModel, Wish, new_model

__all__ = ["Change", "Conversion", "Wish", "convert", "flavor_path", "write", "write_files"]

_DEFAULT_MODEL = "llama3"  # torchtitan 0.2's default, like the next one
_DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class Conversion:
    """What became of a job, or of another project's config (:mod:`.convert_foreign`).

    Attributes:
        changes: one per key, in the file's order; then the added keys, and those that differ.
        text: the new file, a job or a flavor.
        flavor: the name in a job's ``model.flavor``; empty if the user has to name it.
        flavor_file: text of the flavor file that a job needs beside it; empty for none.
        refusal: why there is no new file; empty if there is one.
        differences: what the old model computed and the flavor's does not.
        notes: small deviations that no flavor can express.
    """

    changes: tuple[Change, ...]
    text: str = ""
    flavor: str = ""
    flavor_file: str = ""
    refusal: str = ""
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def dropped(self) -> list[str]:
        """Keys that had an effect and no longer have one."""
        return [change.key for change in self.changes if change.fate == "dropped"]

    @property
    def left_open(self) -> list[Change]:
        """What the user has to fill in."""
        return [change for change in self.changes if change.fate == "open"]

    @property
    def is_whole(self) -> bool:
        """Whether the new file does all that the old one did."""
        return not (self.dropped or self.refusal or self.left_open or self.differences)


def convert(old: Path, new: Path, wish: Wish = Wish()) -> Conversion:  # noqa: B008 (frozen)
    """Return what torchtitan 0.3 accepts from a job of torchtitan 0.2.

    Args:
        old: the job's TOML.
        new: where the new job would go; nothing is written.
        wish: what the user says of the new model.

    Raises:
        EzpzError: ``old`` cannot be read, is not TOML, or has a section in one line; or there is no
            such model as the wish asks for.
    """
    job = OldJob(dict(flat(read_toml(old))))
    model = _new_model(job, new, wish)
    lines = list(_changed_lines(old, job, model))
    more = list(added(job, model))
    changes = (*(change for _, change in lines if change), *more, *differing(job))
    text = _rendered(lines, more, old.name)
    if model is None:  # its model is this package's already, and keeps its flavor
        flavor = job.given.get("model.flavor")
        return Conversion(changes, text, flavor if isinstance(flavor, str) else "")
    return Conversion(changes, text, model.flavor, model.file, model.refusal, model.differences)


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
    is_open = any(each.key == "model.flavor" for each in conversion.left_open)
    if not conversion.flavor_file and not is_open:
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
        new.parent.mkdir(parents=True, exist_ok=True)
        # Write both files before moving either: a full disk then leaves nothing behind. In the same
        # folder, because os.replace cannot move a file to another file system.
        with tempfile.TemporaryDirectory(prefix=".ezpz-moe-", dir=new.parent) as folder:
            for path, text in files.items():
                # newline="": the text has the line endings of the old file already.
                Path(folder, path.name).write_text(text, encoding="utf-8", newline="")
            for path in files:
                os.replace(Path(folder, path.name), path)
    except OSError as error:
        raise EzpzError(f"{new} cannot be written: {error.strerror}.") from error
    return list(files)


# Lines --------------------------------------------------------------------------------------------


def _new_model(job: OldJob, new: Path, wish: Wish) -> NewModel | None:
    """Return what the job trains; None if its model is already this package's."""
    model = job.given.get("model.name", _DEFAULT_MODEL)
    if model == MODEL_NAME and wish == Wish():
        return None
    # A job that names no size got 0.2's default, which the new one has to train too.
    flavor = job.given.get("model.flavor", CHANGED_DEFAULTS["model.flavor"][0])
    length = job.count("training.seq_len", _DEFAULT_SEQ_LEN)
    name = flavor_path(new).stem
    return new_model(model, flavor, seq_len=length, name=name, wish=wish, near=new.parent)


def _changed_lines(
    old: Path, job: OldJob, model: NewModel | None
) -> Iterator[tuple[Statement, Change | None]]:
    """Yield the old file's statements, and for assignments, what becomes of them."""
    # As bytes: read_text() would make one kind of line ending of both.
    for line in statements(old.read_bytes().decode("utf-8-sig")):
        yield line, change_of(*_assigned(line, old), job, model) if line.is_assignment else None


def _assigned(line: Statement, old: Path) -> tuple[str, Any]:
    """Return ``section.name`` and value of an assignment."""
    found = list(flat(line.parsed, line.section))
    if len(found) == 1:
        return found[0]
    key, value = line.section, line.parsed
    while isinstance(value, Mapping) and len(value) == 1:
        ((name, value),) = value.items()
        key = f"{key}.{name}" if key else name
    # A table of a fork's is one value: no key of it is the trainer's.
    if key in sections(KEYS):
        raise EzpzError(
            f"{old}: {line.text.strip()}: is not one key with one value. Write each key on a "
            "line of its own, under its [section]."
        )
    return key, value


# The new file -------------------------------------------------------------------------------------


def _rendered(
    lines: Sequence[tuple[Statement, Change | None]], more: Sequence[Change], source: str
) -> str:
    """Return the old file's statements, with the changes made."""
    text = f"# From {source} of torchtitan 0.2, by ezpz-moe convert.\n\n"
    missing: dict[str, list[Change]] = {}
    for change in [*more, *(change for _, change in lines if change and _goes_away(change))]:
        missing.setdefault(change.new_key.rpartition(".")[0], []).append(change)
    # Sections stay in the user's order: the new file should look like the old one.
    for _, block in groupby(lines, key=lambda pair: pair[0].section):
        text += "".join(_rendered_section(list(block), missing))
    # Sections that the old file lacks go to the end.
    for section, changes in missing.items():
        text += f"\n[{section}]\n" + "".join(_assignment(each, section) for each in changes)
    return text


def _goes_away(change: Change) -> bool:
    """Return whether a key has moved to another section."""
    return change.fate == "moved" and change.new_key.rpartition(".")[0] != change.section


def _rendered_section(
    block: Sequence[tuple[Statement, Change | None]], missing: dict[str, list[Change]]
) -> Iterator[str]:
    """Yield the lines of one section; if nothing is left of it, only the user's comments.

    What the section lacks follows its header, or its first key if it has no header, and is removed
    from ``missing``.
    """
    section = block[0][0].section
    fates = {change.fate for _, change in block if change and not _goes_away(change)}
    has_keys = any(change for _, change in block)
    # `lives`: the header stays. `is_read`: so do comments and blank lines, for whoever reads on.
    is_empty = not has_keys and section in sections(KEYS) | {""}
    lives = is_empty or section in missing or bool(fates & {"kept", "moved", "replaced", "open"})
    is_read = lives or "dropped" in fates or any(line.is_comment for line, _ in block)
    for line, change in block:
        if change:
            yield _rendered_key(line, change)
        elif line.is_header:
            yield line.text if lives else commented(line.text) if "dropped" in fates else ""
        elif is_read:
            yield line.text
        if change or line.is_header:
            for each in missing.pop(change.section if change else section, ()):
                yield _assignment(each, section)


def _rendered_key(line: Statement, change: Change) -> str:
    match change.fate:
        case "kept":
            return line.text
        case "replaced":
            return _assignment(change, line.section)
        case "moved":
            return "" if _goes_away(change) else _assignment(change, line.section)
        case "needless":
            return ""
        case "open" if change.new is not None:
            now = _assignment(change, line.section) if change.to else line.text
            return _remark(change) + now
        case _:
            return _remark(change) + commented(line.text)


def _assignment(change: Change, section: str) -> str:
    """Return a moved, replaced, added or open key, as written under the header ``section``."""
    name = change.new_key.removeprefix(f"{section}.")
    if change.fate == "open" and change.new is None:
        return _remark(change) + commented(f"{name} =\n")
    return assignment(name, change.new, _origin(change))


def _remark(change: Change) -> str:
    """Return why a key is no more than a comment, as one; what is open is to be read there."""
    text = f"{change.fate}: {change.note}"
    return commented((fill(text, width=98) if change.fate == "open" else text) + "\n")


def _origin(change: Change) -> str:
    """Return the comment behind a new value: where it is from."""
    if change.fate == "added":
        return change.note
    if change.fate == "replaced":
        return f"was {shown(change.value)}"
    name = change.key.rpartition(".")[2]
    was = f"[{change.section}] {name}" if _goes_away(change) else name
    return f"was {was}" + (f" = {shown(change.value)}" if change.new != change.value else "")
