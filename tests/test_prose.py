"""README, docs/start, docs/guides: messages are those that are printed, pages keep their form."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "start" / "troubleshooting.md").read_text()
OURS, _, THEIRS = PAGE.partition("\n## Messages of torch and torchtitan\n")
MESSAGES = re.findall(r"^### `(.*)`$", OURS, re.M)
HARMLESS = re.findall(r"^\| `(.*)` \|", THEIRS, re.M)


@cache
def strings() -> list[str]:
    """Every string that the package has in its source, with ``…`` for what an f-string inserts."""
    found = []
    for path in sorted((ROOT / "ezpz_moe").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    each.value if isinstance(each, ast.Constant) else "…" for each in node.values
                )
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_printed(message: str) -> None:
    """In one string, in this order."""
    pieces = [piece for each in message.split("…") if (piece := each.strip(" :"))]
    assert max(map(len, pieces)) > 10, "too short to find"
    pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
    assert any(pattern.search(each) for each in strings()), message


def test_enough_messages_are_explained() -> None:
    assert len(MESSAGES) >= 20
    assert len(set(MESSAGES)) == len(MESSAGES)


def test_a_line_that_is_called_harmless_is_printed_by_torchtitan() -> None:
    places = [find_spec("torchtitan").submodule_search_locations[0]]
    sources = "".join(path.read_text() for each in places for path in Path(each).rglob("*.py"))
    of_torch = {line for line in HARMLESS if line.startswith(("In CPU autocast", "DTensor random"))}
    assert len(of_torch) == 2
    assert [line for line in HARMLESS if line not in of_torch and line not in sources] == []


def test_the_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


GUIDES = (
    *("job-file", "data", "checkpoints", "clusters", "moving", "convert", "upcycle", "telemetry"),
    *("analysis", "backends", "precision"),
)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_ends_with_what_one_should_see(guide: str) -> None:
    text = (ROOT / "docs" / "guides" / f"{guide}.md").read_text()
    _, heading, end = text.rpartition("\n## ")
    assert heading
    assert end.startswith("What you should see\n")
    assert "\n```" in end
    assert not re.search(r"^[A-Z]+_OUTPUT$", text, re.M), "still to be filled in"
