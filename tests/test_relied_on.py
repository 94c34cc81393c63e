"""The lists of what is relied on have a line for each name of the host's that a binding imports.

Nothing of the host is imported here: a binding can be read with any host, or with none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from ezpz_moe import hosts
from ezpz_moe.hosts.detect import HOSTS
from ezpz_moe.hosts.host import Host
from ezpz_moe.hosts.parts import Tokenizer
from ezpz_moe.hosts.reliance import Reliance
from ezpz_moe.hosts.titan.v0_3 import Titan03

FOR_SOME_FLAVORS = (
    "ezpz_moe.hosts.titan.chats",
    "ezpz_moe.hosts.titan.ffn_nodes",
    "ezpz_moe.hosts.titan.routing",
    "ezpz_moe.hosts.titan.metrics",
    "ezpz_moe.hosts.titan.labelled",
    "ezpz_moe.hosts.titan.changed",
    "ezpz_moe.hosts.titan.dense",
    "ezpz_moe.hosts.titan.initialized",
    "ezpz_moe.hosts.titan.latent",
    "ezpz_moe.hosts.titan.overlap",
    "ezpz_moe.hosts.titan.scores",
    "ezpz_moe.hosts.titan.gating_residual",
    "ezpz_moe.hosts.titan.train_only",
)
"""What is imported only for a flavor with other FFNs, [router], [balance] or [telemetry], for
chats, or for a model that differs from the host's."""
WHERE_A_FAILURE_IS_CAUGHT = (
    "ezpz_moe.hosts.titan.anatomy",
    "ezpz_moe.hosts.titan.components",
    "ezpz_moe.hosts.titan.cpu_metrics",
)
"""What is imported only for what is logged, without which a run goes on."""
FOR_FLAGS_WITHOUT_A_RUN = ("ezpz_moe.hosts.told",)
"""What a run, whose flags the trainer reads itself, does without."""

ROOT = Path(hosts.__file__).parent.parent.parent


def source(module: str) -> Path:
    return Path(ROOT, *module.split(".")).with_suffix(".py")


def names(*nodes: ast.AST) -> Iterator[str]:
    """What code imports, dotted: ``from a.b import c`` is a.b.c."""
    for node in (inner for each in nodes for inner in ast.walk(each)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def asked(*nodes: ast.AST) -> Iterator[str]:
    """The attributes that code takes of a host: ``titan().x``, and in its own class ``self.x``."""
    for node in (inner for each in nodes for inner in ast.walk(each)):
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="titan"))):
                yield node.attr
            case ast.Attribute(value=ast.Name(id="self" | "host")):
                yield node.attr


def code_of(host: Host, method: str) -> list[ast.AST]:
    """A method as this host has it, with the functions beside its class that it calls."""
    owner = next((each for each in type(host).__mro__ if method in vars(each)), None)
    if owner is None or owner is Host or not owner.__module__.startswith("ezpz_moe."):
        return []
    tree = ast.parse(source(owner.__module__).read_text())
    functions = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    (own,) = (each for each in tree.body if getattr(each, "name", None) == owner.__name__)
    found = [each for each in own.body if getattr(each, "name", None) == method]
    used = {each.id for node in found for each in ast.walk(node) if isinstance(each, ast.Name)}
    return [*found, *(functions[name] for name in used & functions.keys())]


def behind(host: Host, *methods: str, without: Iterable[str] = ()) -> set[str]:
    """All modules below ``ezpz_moe.hosts`` that methods of a host bring along."""
    modules: set[str] = set()
    seen: set[str] = set()
    code = [node for method in methods for node in code_of(host, method)]
    while code:
        imported, others = set(names(*code)), set(asked(*code)) - seen
        imported |= {name.rpartition(".")[0] for name in imported}
        new = {
            name
            for name in imported - modules - set(without)
            if name.startswith("ezpz_moe.hosts.") and source(name).exists() and not is_class(name)
        }
        modules |= new
        seen |= others
        code = [ast.parse(source(module).read_text()) for module in new]
        code += [node for method in others for node in code_of(host, method)]
    return modules


def is_class(module: str) -> bool:
    """Whether it is the file of a host's class, whose methods count one by one."""
    return module == Host.__module__ or module in {each.__module__ for each in map(type, HOSTS)}


def of_the_host(modules: Iterable[str]) -> set[str]:
    imported = {name for module in modules for name in names(ast.parse(source(module).read_text()))}
    return {name for name in imported if name.partition(".")[0] == "torchtitan"}


def in_lines(lines: Iterable[Reliance]) -> set[str]:
    """What the lines name, dotted: their modules, and the names in these."""
    found = set()
    for line in lines:
        module, _, attribute = line.thing.partition(":")
        inside = (attribute.partition(".")[0], *line.has)
        found |= {module, *(f"{module}.{name}" for name in inside)}
    return found


@pytest.mark.parametrize("each", HOSTS, ids=lambda each: each.generation)
def test_each_imported_name_has_a_line(each: Host) -> None:
    found = behind(each, *dir(type(each)))
    assert found >= {name for name in each.modules() if of_the_host([name])}, "not all were found"
    assert of_the_host(found) - in_lines(each.relied_on) == set()


@pytest.mark.parametrize("each", HOSTS, ids=lambda each: each.generation)
def test_what_a_job_cannot_do_without_is_vital(each: Host) -> None:
    """An import that fails there ends every run, so that it has to be refused before."""
    without = (*FOR_SOME_FLAVORS, *WHERE_A_FAILURE_IS_CAUGHT, *FOR_FLAGS_WITHOUT_A_RUN)
    imported = of_the_host(behind(each, "trainer_config", without=without))
    assert len(imported) > 20, "the imports were not found"
    assert imported - in_lines(line for line in each.relied_on if line.vital) == set()


def test_a_binding_that_imports_something_new_is_found() -> None:
    new = "import torchtitan.a\nfrom torchtitan.b import c\nfrom ezpz_moe.config import job\n"
    assert set(names(ast.parse(new))) == {
        "torchtitan.a",
        "torchtitan.b.c",
        "ezpz_moe.config.job",
    }
    line = Reliance("torchtitan.b", used_for="x", if_broken="x", has=("c",))
    assert in_lines([line]) >= {"torchtitan.b", "torchtitan.b.c"}
    assert "torchtitan.a" not in in_lines([line])


def line_of(thing: str) -> Reliance:
    (line,) = (line for line in Titan03().relied_on if line.thing == thing)
    return line


def test_all_that_commands_use_of_a_tokenizer_is_relied_on() -> None:
    line = line_of("torchtitan.components.tokenizer:HuggingFaceTokenizer")
    methods = {name for name in vars(Tokenizer) if not name.startswith("_")}
    assert set(line.has) == methods
    assert set(line.sets) == Tokenizer.__annotations__.keys()
    assert "`generate`" in line.if_broken


def test_all_that_chats_take_of_the_hosts_dataloader_is_relied_on() -> None:
    """But for what our subclass of its Config has itself."""
    code = source("ezpz_moe.hosts.titan.chats").read_text()
    line = line_of("torchtitan.components.dataloader:ParallelAwareDataloader.Config")
    assert {*line.fields, "infinite"} == set(re.findall(r"\bconfig\.(\w+)", code))
