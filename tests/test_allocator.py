"""The process that trains on a CPU keeps what it frees, unless the user has chosen otherwise."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import fork_server
import pytest

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools import allocator

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
SAID = (
    "ezpz_moe: freed memory is kept, because on a CPU fresh memory costs time in every step "
    "(MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=-1). To give it back, set EZPZ_MOE_KEEP_MEMORY=0\n"
)
_MIB = 2**20

# In place of the trainer: a large block is filled and freed, then as large a one is filled.
WORKER = f"""
import ctypes, json, os, resource, runpy, sys

import ezpz_moe.train
from ezpz_moe.hosts import cpu

PR_SET_THP_DISABLE = 41  # a huge page would be a single fault

def fill():
    return len(b"x" * {64 * _MIB})

def train(*_, **__):
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    variables = {{name: text for name, text in os.environ.items() if name.startswith("MALLOC")}}
    print(json.dumps([faults, variables]))

runpy.run_module = train
ezpz_moe.train.check_host = lambda: None
cpu.no_accelerator = lambda: "on an accelerator" not in sys.argv
ezpz_moe.train.main()
"""
PAGES = 64 * _MIB // os.sysconf("SC_PAGESIZE")

on_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not on glibc"
)


def worker(*arguments: str, **variables: str) -> tuple[str, int, dict]:
    """What a worker says, its page faults for a block that it had before, and its variables."""
    ours = ("MALLOC_", "GLIBC_TUNABLES", allocator.VARIABLE)
    clean = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    result = subprocess.run(
        [fork_server.python(), "-c", WORKER, *arguments],
        env={**clean, "LOCAL_RANK": "0", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    *said, measured = result.stdout.splitlines(keepends=True)
    return "".join(said), *json.loads(measured)


@on_glibc
def test_a_block_that_was_freed_costs_no_page_faults_again():
    said, faults, variables = worker()
    assert said == SAID
    assert faults < PAGES / 100
    assert variables == KEPT  # by which `auto` tells its times apart


@on_glibc
def test_each_rank_keeps_its_memory_and_the_first_says_so():
    said, faults, variables = worker(LOCAL_RANK="1")
    assert said == ""
    assert faults < PAGES / 100
    assert variables == KEPT


@on_glibc
@pytest.mark.parametrize(
    ("arguments", "variables"),
    [((), {allocator.VARIABLE: "0"}), (("on an accelerator",), {})],
    ids=["turned off", "on an accelerator"],
)
def test_elsewhere_the_allocator_is_as_it_was_and_nothing_is_said(arguments, variables):
    said, faults, kept = worker(*arguments, **variables)
    assert said == ""
    assert faults >= PAGES
    assert kept == {}


@on_glibc
@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({"MALLOC_MMAP_MAX_": "9"}, "MALLOC_MMAP_MAX_=9"),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, "MALLOC_MMAP_THRESHOLD_=65536"),
        ({"MALLOC_TRIM_THRESHOLD_": "0"}, "MALLOC_TRIM_THRESHOLD_=0"),
        ({"MALLOC_TOP_PAD_": ""}, "MALLOC_TOP_PAD_="),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.mmap_max=9"},
            "GLIBC_TUNABLES=glibc.malloc.mmap_max=9",
        ),
    ],
)
def test_what_the_user_has_set_stands(variables, chosen):
    said, faults, kept = worker(**variables)
    assert said == f"ezpz_moe: {chosen} is set, so the memory allocator is left as it is\n"
    assert faults >= PAGES
    assert kept == {name: text for name, text in variables.items() if name.startswith("MALLOC")}


@on_glibc
@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.cpu.x86_ibt=on"}],
)
def test_settings_that_decide_something_else_go_with_ours(variables):
    said, faults, _ = worker(**variables)
    assert said == SAID
    assert faults < PAGES / 100


AN_ALLOCATOR = """
extern void *__libc_malloc(unsigned long);
void *malloc(unsigned long size) { return __libc_malloc(size); }
"""


@on_glibc
def test_another_allocator_is_left_alone(tmp_path):
    """As jemalloc and the like: loaded first, it is everyone's malloc."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler makes an allocator here")
    library = tmp_path / "libmine.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=AN_ALLOCATOR, text=True, check=True)
    code = "from ezpz_moe.tools import allocator; print(allocator.keep_freed_memory())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"memory is allocated by {library}, which is left as it is\n"


def test_another_c_library_gets_nothing(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc=None))
    assert allocator.keep_freed_memory() is None


@on_glibc
def test_a_setting_that_glibc_refuses_is_not_said_to_hold(monkeypatch):
    monkeypatch.setattr(allocator, "_SETTINGS", ((-1000, 1, "MALLOC_NONE_"),))
    for name in KEPT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_file_of", lambda function: "libc.so.6")
    monkeypatch.setattr(
        ctypes,
        "CDLL",
        lambda _: SimpleNamespace(
            malloc=None, gnu_get_libc_version=None, mallopt=lambda number, value: 0
        ),
    )
    said = allocator.keep_freed_memory()
    assert said == "freed memory is not kept: glibc refused MALLOC_NONE_=1"
    assert "MALLOC_NONE_" not in os.environ


@pytest.mark.parametrize("value", ["", "no", "2"])
def test_a_value_that_is_no_answer_is_refused(value, monkeypatch):
    monkeypatch.setenv(allocator.VARIABLE, value)
    with pytest.raises(EzpzError, match=f"EZPZ_MOE_KEEP_MEMORY = '{value}': must be 1, .* or 0"):
        allocator.is_wanted()
