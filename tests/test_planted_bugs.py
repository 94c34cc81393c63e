"""``scripts/plant_bugs.py``: its bugs fit today's source, and it tells caught from missed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def plant_bugs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import plant_bugs

    yield plant_bugs
    del sys.modules["plant_bugs"]


def test_every_bug_can_be_planted(plant_bugs) -> None:
    """Whoever changes such a line changes the bug with it, in scripts/planted_bugs.toml."""
    bugs = plant_bugs.bugs()
    assert len({bug.name for bug in bugs}) == len(bugs) >= 40
    for bug in bugs:
        text = bug.planted((plant_bugs.ROOT / bug.file).read_text())
        if bug.file.endswith(".py"):
            compile(text, bug.file, "exec")


SOUND = "def double(x):\n    return 2 * x\n"
TEST = "from sound import double\n\n\ndef test_double():\n    assert double(3) == 6\n"


@pytest.mark.parametrize(
    ("old", "new", "caught", "said"),
    [
        ("2 * x", "3 * x", True, "by test_it.py::test_double"),
        ("2 * x", "x + x", False, "SURVIVES test_it.py"),
        ("2 * x", "2 *", False, "the tests cannot be run with it"),
        ("4 * x", "5 * x", False, "no longer applies"),
    ],
)
def test_a_bug_is_caught_or_missed(plant_bugs, tmp_path, old, new, caught, said) -> None:
    (tmp_path / "sound.py").write_text(SOUND)
    (tmp_path / "test_it.py").write_text(TEST)
    bug = plant_bugs.Bug("bug", "sound.py", old, new, "test_it.py")
    found, what = plant_bugs.judge(bug, tmp_path, {})
    assert (found, what.startswith(said)) == (caught, True), what
    assert (tmp_path / "sound.py").read_text() == SOUND


def test_a_bug_whose_tests_fail_without_it_is_missed(plant_bugs, tmp_path) -> None:
    (tmp_path / "sound.py").write_text(SOUND)
    (tmp_path / "test_it.py").write_text(TEST.replace("6", "7"))
    bug = plant_bugs.Bug("bug", "sound.py", "2 * x", "3 * x", "test_it.py")
    found, what = plant_bugs.judge(bug, tmp_path, {})
    assert not found
    assert what.startswith("its tests do not pass without it")


def test_the_copy_has_what_the_checkout_has(plant_bugs) -> None:
    with plant_bugs.copy_of_checkout() as checkout:
        for name in ("ezpz_moe/compute/runs.py", "tests/test_planted_bugs.py", "pyproject.toml"):
            assert (checkout / name).read_bytes() == (plant_bugs.ROOT / name).read_bytes()
        assert not (checkout / ".git").exists()
    assert not checkout.exists()
