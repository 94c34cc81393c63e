"""The lists of what is relied on have a line for each name of the host's that a binding imports.

Nothing is imported here: a binding can be read with any host, or with none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from ezpz_moe import hosts
from ezpz_moe.hosts import GENERATIONS, Generation
from ezpz_moe.hosts.reliance import Reliance

FOR_SOME_FLAVORS = ("routing", "metrics")
"""Slots that are bound only for a flavor with [router], [balance] or [telemetry]."""

ROOT = Path(hosts.__file__).parent.parent.parent


def source(module: str) -> Path:
    return Path(ROOT, *module.split(".")).with_suffix(".py")


def names(path: Path) -> Iterator[str]:
    """What a file imports, dotted: ``from a.b import c`` is a.b.c."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def bound(path: Path, slots: Mapping[str, str]) -> Iterator[str]:
    """The modules that a file asks for as ``binding("slot")``."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="binding"), args=[ast.Constant(value=slot)]):
                yield slots[slot]


def behind(
    modules: Iterable[str], slots: Mapping[str, str], *, without: Iterable[str] = ()
) -> set[str]:
    """``modules`` and all modules below ``ezpz_moe.hosts`` that they bring along."""
    left_out = {slots[slot] for slot in without if slot in slots}
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found and module.startswith("ezpz_moe.hosts.") and source(module).exists():
            found.add(module)
            path = source(module)
            for name in names(path):
                waiting += [name, name.rpartition(".")[0]]
            waiting += set(bound(path, slots)) - left_out
    return found


def of_the_host(modules: Iterable[str]) -> set[str]:
    imported = {name for module in modules for name in names(source(module))}
    return {name for name in imported if name.partition(".")[0] == "torchtitan"}


def in_lines(lines: Iterable[Reliance]) -> set[str]:
    """What the lines name, dotted: their modules, and the names in these."""
    found = set()
    for line in lines:
        module, _, attribute = line.thing.partition(":")
        inside = (attribute.partition(".")[0], *line.has)
        found |= {module, *(f"{module}.{name}" for name in inside)}
    return found


@pytest.mark.parametrize("each", GENERATIONS, ids=lambda each: each.folder)
def test_each_imported_name_has_a_line(each: Generation) -> None:
    slots = each.slots()
    imported = of_the_host(behind(slots.values(), slots))
    assert len(imported) > 20, "the imports were not found"
    assert imported - in_lines(each.relied_on) == set()


@pytest.mark.parametrize("each", GENERATIONS, ids=lambda each: each.folder)
def test_what_a_job_cannot_do_without_is_vital(each: Generation) -> None:
    """An import that fails there ends every run, so that it has to be refused before."""
    slots = each.slots()
    imported = of_the_host(behind([slots["job"]], slots, without=FOR_SOME_FLAVORS))
    assert len(imported) > 20, "the imports were not found"
    assert imported - in_lines(line for line in each.relied_on if line.vital) == set()


def test_a_binding_that_imports_something_new_is_found(tmp_path) -> None:
    file = tmp_path / "new.py"
    file.write_text(
        "import torchtitan.a\nfrom torchtitan.b import c\nfrom ezpz_moe.config import job\n"
    )
    assert set(names(file)) == {"torchtitan.a", "torchtitan.b.c", "ezpz_moe.config.job"}
    line = Reliance("torchtitan.b", used_for="x", if_broken="x", has=("c",))
    assert in_lines([line]) >= {"torchtitan.b", "torchtitan.b.c"}
    assert "torchtitan.a" not in in_lines([line])
