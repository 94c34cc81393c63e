"""Flavors: model sizes as data, read from TOML.

A flavor is one TOML file, and its name is the file's name. :func:`load_flavor` resolves a name in
four steps: find the file, follow ``inherits``, apply a variant's suffix, validate. Every mistake
raises :class:`~ezpz_moe.errors.EzpzError` with the file and the key. This module imports neither
torch nor the host.

The search starts in the job's own folder, continues in the folder named by ``EZPZ_MOE_FLAVORS``
and ends with the shipped flavors; the first file of a name wins. A name with a leading underscore
is only a parent for ``inherits``.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from ezpz_moe.compute.names import known_backend_names
from ezpz_moe.config import dense_flavors
from ezpz_moe.config.change_schema import Change
from ezpz_moe.config.flavor_mistakes import (
    DIMENSION_KEYS,
    FLAVOR_KEYS,
    TABLES,
    homes,
    messages,
    quoted,
)
from ezpz_moe.config.flavor_schema import Attention, Dimensions, Flavor
from ezpz_moe.config.foreign_keys import meaning
from ezpz_moe.config.toml import read_toml
from ezpz_moe.errors import EzpzError, did_you_mean, short

__all__ = [
    "FOLDER_VARIABLE",
    "Dimensions",
    "Flavor",
    "flavor_homes",
    "flavor_names",
    "is_flavor",
    "load_flavor",
    "split_name",
    "with_variant",
]

FOLDER_VARIABLE = "EZPZ_MOE_FLAVORS"


def load_flavor(name: str, *, near: Path | None = None) -> Flavor:
    """Load the flavor ``name``: a file's name, optionally with ``[_<attention>][_<backend>]``.

    Args:
        name: for example ``"10B_2B"`` or ``"10B_2B_sdpa_batched_mm_padded"``.
        near: the folder to search first, which is the job file's.

    Raises:
        EzpzError: there is no such flavor, or ``EZPZ_MOE_FLAVORS``, the flavor's file or a parent's
            is wrong.
    """
    return _load(name, _folders(near))


def _load(name: str, folders: Sequence[Path]) -> Flavor:
    files = _public(_flavor_files(folders))
    if found := split_name(name, files):
        return _resolve(name, files[found[0]], folders, found[1])
    if (stem := Path(name).name.removesuffix(".toml")) in files and stem != name:
        raise EzpzError(f"{short(name)!r} is a path. Write the flavor's name alone: {stem!r}.")
    # Nobody means a file that cannot be read, which may be a job as well.
    readable = [stem for stem, path in files.items() if _is_readable(path)]
    raise EzpzError(_not_found(name, folders, sorted(readable)))


def flavor_names(*, near: Path | None = None) -> list[str]:
    """Return the flavors' names, as in their files. Any of :func:`variant_suffixes` may follow."""
    return sorted(_public(_flavor_files(_folders(near))))


def split_name(name: str, names: Iterable[str]) -> tuple[str, dict[str, str]] | None:
    """Return which of the flavors ``name`` is, and the keys that its suffix sets; None if none."""
    # By the suffixes that exist, not at an underscore: names of files and backends have underscores
    # too.
    suffixes = variant_suffixes()
    # Try the longest file name first: a file `16B_sdpa.toml` beats a variant of `16B`.
    for stem in sorted(names, key=len, reverse=True):
        suffix = name.removeprefix(stem)
        if name == stem + suffix and suffix in suffixes:
            return stem, suffixes[suffix]
    return None


def with_variant(
    name: str, key: Literal["attention", "compute_backend"], value: str, *, near: Path | None = None
) -> str:
    """Return the name of the same flavor with another attention or backend; empty if none has it.

    Args:
        name: of a flavor, which may be a variant.
        key: what a suffix of the name sets.
        value: of the key.
        near: as in :func:`load_flavor`.
    """
    found = split_name(name, flavor_names(near=near))
    if found is None:
        return ""
    stem, given = found[0], {**found[1], key: value}
    keys = ("attention", "compute_backend")
    other = "_".join([stem, *(given[each] for each in keys if each in given)])
    # A file may have this name, and yet another value.
    try:
        return other if getattr(load_flavor(other, near=near), key) == value else ""
    except EzpzError:
        return ""


def variant_suffixes() -> dict[str, dict[str, str]]:
    """Return each suffix ``[_<attention>][_<backend>]``, with the keys that it sets."""
    attentions = [("", {}), *((f"_{a}", {"attention": a}) for a in get_args(Attention))]
    backends = [("", {}), *((f"_{b}", {"compute_backend": b}) for b in known_backend_names())]
    return {
        a + b: set_by_a | set_by_b for (a, set_by_a), (b, set_by_b) in product(attentions, backends)
    }


# Files --------------------------------------------------------------------------------------------


def _folders(near: Path | None) -> list[Path]:
    """Return the folders to search for flavors, in order."""
    folders = [near] if near is not None else []
    if named := os.environ.get(FOLDER_VARIABLE):
        folder = Path(os.path.expanduser(named))
        if not folder.is_dir():
            raise EzpzError(
                f"{FOLDER_VARIABLE} = {named!r}: there is no such folder. "
                "Set it to a folder of flavor TOML files, or unset it."
            )
        folders.append(folder)
    folders.append(_shipped_folder())
    # EZPZ_MOE_FLAVORS may name the job's folder or the shipped one: search each folder once.
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def _shipped_folder() -> Path:
    """Return the flavors' folder: in the wheel, or in a checkout."""
    package = Path(__file__).parents[1]
    # pyproject.toml puts the folder into the package; in a checkout it lies beside it.
    in_wheel = package / "_flavors"
    return in_wheel if in_wheel.is_dir() else package.parent / "flavors"


def _flavor_files(folders: Sequence[Path]) -> Mapping[str, Path]:
    """Map a file's name without ``.toml`` -> the first flavor file of that name."""
    # The first map that has a name wins, which is the order of the search.
    return ChainMap(
        *(
            {path.stem: path for path in sorted(folder.glob("*.toml")) if _is_flavor_file(path)}
            for folder in folders
        )
    )


def _is_flavor_file(path: Path) -> bool:
    """Return whether the TOML is a flavor: jobs and flavors may share a folder.

    An unreadable file counts as a flavor. Whoever names it then learns what is wrong with it.
    """
    try:
        return is_flavor(read_toml(path))
    except EzpzError:
        return True


def _is_readable(path: Path) -> bool:
    try:
        read_toml(path)
    except EzpzError:
        return False
    return True


def is_flavor(document: Mapping[str, Any]) -> bool:
    """Return whether a TOML has any key of a flavor, and not the [model] of a job."""
    return "model" not in document and not FLAVOR_KEYS.isdisjoint(document)


def flavor_homes(key: str) -> list[str]:
    """Return where a key or table of a flavor belongs, for whoever wrote it into a job."""
    return ["in the flavor's file"] if key in FLAVOR_KEYS else []


def _public(files: Mapping[str, Path]) -> dict[str, Path]:
    return {stem: path for stem, path in files.items() if not stem.startswith("_")}


# Inheritance --------------------------------------------------------------------------------------

_INSTEAD = {
    "n_dense_layers": "moe_layers",
    "moe_layers": "n_dense_layers",
    "num_shared_experts": "shared_hidden_dim",
    "shared_hidden_dim": "num_shared_experts",
}
"""Two keys of one meaning: a file that says one does not inherit the other."""


def _chain(path: Path, folders: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the file and its ancestors, youngest first, each with its keys except ``inherits``."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    parent: Path | None = path
    while parent is not None:
        if parent in (seen := [ancestor for ancestor, _ in chain]):
            loop = " -> ".join(p.stem for p in [*seen[seen.index(parent) :], parent])
            raise EzpzError(f"{chain[-1][0]}: inherits: the flavors inherit in a circle: {loop}.")
        data = read_toml(parent)
        if unknown := [key for key in data if key not in FLAVOR_KEYS]:
            raise EzpzError(
                f"{parent}: unknown key {unknown[0]!r}."
                f"{meaning(unknown[0], FLAVOR_KEYS, homes(unknown[0]))}"
            )
        # Not left to the merged table: what is inherited would hide it.
        if data.get("change") == {}:
            raise EzpzError(
                f"{parent}: [change] is empty, so nothing differs from the base. Set a key of it, "
                "such as num_experts = 64, or remove it."
            )
        name = data.pop("inherits", None)
        chain.append((parent, data))
        parent = None if name is None else _parent(parent, name, folders)
    return chain


def _parent(child: Path, name: Any, folders: Sequence[Path]) -> Path:
    """Return the file that ``child`` inherits.

    The search starts at the child's own folder: a user's file never changes a shipped flavor that
    inherits the same name. A file may inherit its namesake from a later folder.
    """
    if not isinstance(name, str):
        raise EzpzError(f"{child}: inherits = {quoted(name)}: should be the name of a flavor.")
    # Files come from these folders only, so the parent folder is always among them.
    own = folders.index(child.parent)
    files = _flavor_files(folders[own + 1 if name == child.stem else own :])
    if name not in files:
        other = " besides this one" if name == child.stem else ""
        hint = _of_variant(name, files) or did_you_mean(name, files)
        raise EzpzError(f"{child}: inherits = {name!r}: there is no such flavor file{other}.{hint}")
    return files[name]


def _of_variant(name: str, files: Iterable[str]) -> str:
    """Return what to write to inherit a variant, which has no file; nothing if it is none."""
    if (found := split_name(name, files)) is None:
        return ""
    keys = " and ".join(f'{key} = "{value}"' for key, value in found[1].items())
    return f' It is a variant: write inherits = "{found[0]}" with {keys}.'


def _merge(chain: Sequence[tuple[Path, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the merged values, children over parents, and the file that set each key."""
    values: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    # Oldest first: children overwrite.
    for path, data in reversed(chain):
        _overwrite(values, data, path, origin)
    return values, origin


def _overwrite(
    values: dict[str, Any],
    data: dict[str, Any],
    path: Path,
    origin: dict[str, Path],
    table: str = "",
) -> None:
    """Put the file's keys into ``values``, those of a table such as [rope] one by one."""
    for key, value in data.items():
        name = f"{table}{key}"
        origin[name] = path
        if (other := _INSTEAD.get(name)) and other not in data:
            values.pop(other, None)
        if name in TABLES and isinstance(value, dict):
            inherited = values.get(key)
            values[key] = dict(inherited) if isinstance(inherited, dict) else {}
            _overwrite(values[key], value, path, origin, f"{name}.")
        else:  # any other value replaces the parent's, a schedule as well
            values[key] = value


# Validation ---------------------------------------------------------------------------------------


def _resolve(name: str, path: Path, folders: Sequence[Path], variant: dict[str, str]) -> Flavor:
    values, origin = _merge(_chain(path, folders))
    is_baseline = dense_flavors.OF in values
    is_dense = "base" not in values and dense_flavors.all_dense(values)
    if is_baseline or is_dense:
        dense_flavors.refuse_backend(variant, name, path)
    if is_baseline:
        values = dense_flavors.baseline(values, path, lambda named: _with_experts(named, folders))
    elif is_dense:
        values = dense_flavors.without_experts(values, origin, path)
    if not is_baseline:
        _gather_dimensions(values, origin, path)
    try:
        # The variant comes last: a suffix of the name beats the key in the file.
        return Flavor.model_validate({"name": name, "source": path, **values, **variant})
    except ValidationError as error:
        raise EzpzError("\n".join(messages(error.errors(), path, origin))) from error


def _with_experts(name: str, folders: Sequence[Path]) -> Flavor:
    """Load a flavor that is no baseline itself: two files could name each other."""
    files = _public(_flavor_files(folders))
    found = split_name(name, files)
    if found and dense_flavors.OF in _merge(_chain(files[found[0]], folders))[0]:
        raise EzpzError(
            f"{files[found[0]]} is a dense baseline itself. Name a flavor with experts."
        )
    return _load(name, folders)


def _gather_dimensions(values: dict[str, Any], origin: Mapping[str, Path], path: Path) -> None:
    """Put the sizes into a model of their own, in place; with ``base`` there may be none."""
    if "equal" in values:
        raise EzpzError(
            f"{origin['equal']}: equal = {quoted(values['equal'])} says what a dense_baseline_of "
            "has in common with the flavor that it names. Set that, or remove it."
        )
    # Of its RoPE, also a model of the host's may say how far it reaches.
    rope = values.get("rope")
    is_length = "base" in values and isinstance(rope, dict) and rope.keys() == {"max_seq_len"}
    of_size = DIMENSION_KEYS - ({"rope"} if is_length else set())
    dimensions = {key: values.pop(key) for key in of_size & values.keys()}
    if "base" in values and dimensions:
        set_here = ", ".join(f"{key} ({origin[key].name})" for key in sorted(dimensions))
        can_change = dimensions.keys() <= Change.model_fields.keys()
        table = "[change] is the table for what differs; else remove" if can_change else "Remove"
        raise EzpzError(
            f"{path}: base = {quoted(values['base'])} takes every dimension from torchtitan's own "
            f"model, except [rope] max_seq_len, so these keys would be ignored: {set_here}. "
            f"{table} either them or base."
        )
    if "base" not in values:
        values["dimensions"] = dimensions


def _not_found(name: str, folders: Sequence[Path], known: Sequence[str]) -> str:
    for folder in folders:
        # A name with a slash leads out of the folder, where no flavors are looked for.
        path = folder / f"{name}.toml"
        # Not path.is_file(), which raises for a name that is too long for a file.
        if path.name == f"{name}.toml" and os.path.isfile(path):
            return f"{path} is not a flavor: {_why_no_flavor(path)}"
    if Path(name).name != name:
        return (
            f"{short(name)!r} is a path. A flavor is a name, that of a TOML file beside the job or "
            f"in the folder that {FOLDER_VARIABLE} names, without .toml."
        )
    # All variants, for the hint: `16B_sdap` is nearest to one of them.
    variants = [stem + suffix for stem, suffix in product(known, variant_suffixes())]
    return (
        f"unknown flavor {short(name)!r} in {', '.join(map(str, folders))} "
        f"({FOLDER_VARIABLE} adds a folder). Known are {', '.join(known)}, "
        f"each also with [_<attention>][_<backend>].{did_you_mean(name, variants)}"
    )


def _why_no_flavor(path: Path) -> str:
    if path.name.startswith("_"):
        return "it is a parent for `inherits`."
    document = read_toml(path)
    if "model" in document:
        return "it has the [model] of a job."
    unknown = next(iter(document), None)
    hint = f" {unknown!r} is unknown.{meaning(unknown, FLAVOR_KEYS, [])}" if unknown else ""
    return f"it has no key of a flavor, such as inherits, base or dim.{hint}"
