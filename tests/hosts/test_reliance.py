"""What the binding relies on in the host is data, and the installed host has it."""

import dataclasses

import pytest

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import HOSTS, check_host, host, presumed_host
from ezpz_moe.hosts.reliance import Reliance, broken
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02

check_host()

pytestmark = pytest.mark.smoke


def reliance(thing: str, **more) -> Reliance:
    return Reliance(thing, used_for="a test", if_broken="it fails", **more)


@dataclasses.dataclass
class Fields:
    one: int
    two: int


class Base:
    def __init__(self) -> None:
        self.inherited = 1


class Sets(Base):
    def __init__(self) -> None:
        super().__init__()
        self.own: int = 2


def takes_anything(first, **more):
    return first, more


@pytest.mark.parametrize("line", host().relied_on, ids=lambda line: line.thing)
def test_the_installed_host_has_what_the_binding_relies_on(line):
    assert line.why_broken() == ""


def test_the_hosts_files_tell_its_generation_without_importing_it():
    assert presumed_host() is host()


@pytest.mark.parametrize("each", HOSTS, ids=lambda each: each.generation)
def test_every_line_says_what_it_is_for_and_what_its_absence_means(each):
    lines = each.relied_on
    assert len({line.thing for line in lines}) == len(lines)
    assert all(line.used_for and line.if_broken for line in lines)
    assert any(line.vital for line in lines)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (reliance("no_such_module:thing"), "No module named 'no_such_module'"),
        (reliance("json:no_such_function"), "json has no no_such_function"),
        (reliance("textwrap:dedent", takes=("text", "by")), "does not take by, but text"),
        (reliance("textwrap", has=("dedent", "bedent")), "has no bedent"),
        (reliance(f"{__name__}:Fields", fields=("one", "three")), "has no field three"),
        (reliance("pathlib:Path", fields=("one",)), "is not a dataclass"),
        (reliance(f"{__name__}:Sets", sets=("own", "other")), "its __init__ sets no other"),
        (reliance("builtins:max", takes=("one",)), "ValueError: no signature found"),
        (reliance("json", takes=("one",), has=("loads",)), "TypeError: <module 'json'"),
        (reliance("no_such_module"), "No module named 'no_such_module'"),
        (reliance("no_such.module"), "No module named 'no_such'"),
    ],
)
def test_a_broken_line_says_what_is_missing(line, reason):
    assert reason in line.why_broken()
    assert broken([line, reliance("json:loads")]) == {line: line.why_broken()}


@pytest.mark.parametrize(
    "line",
    [
        reliance("textwrap:dedent", takes=("text",)),
        reliance("textwrap", has=("dedent",)),
        reliance("textwrap"),
        reliance(f"{__name__}:takes_anything", takes=("second",)),
        reliance(f"{__name__}:Fields", fields=("two",)),
        reliance(f"{__name__}:Sets", sets=("own", "inherited")),
    ],
)
def test_a_line_that_holds(line):
    assert line.why_broken() == ""


def test_a_module_that_raises_is_broken_and_one_that_is_only_looked_for_is_not_imported(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raises.py").write_text("raise RuntimeError('of two\\nlines')\n")
    assert reliance("raises:thing").why_broken() == "RuntimeError: of two lines"
    assert reliance("raises", has=("thing",)).why_broken() == "RuntimeError: of two lines"
    assert reliance("raises").why_broken() == ""


def test_a_part_that_a_binding_does_not_have_is_said_with_its_host():
    with pytest.raises(EzpzError, match=r"cannot do this with torchtitan 0.2: .* no memory"):
        Titan02().memory()
