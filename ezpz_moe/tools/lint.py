"""Find trainer flags in shell, PBS and Slurm scripts, and say which the installed host accepts.

A trainer flag is ``--section.key``; flags of srun, mpiexec and torchrun have no dot. So it does not
matter which command a word belongs to, and flags are found in arrays, strings and here-documents
too. What became of a flag is in the tables of the job's keys.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import chain
from pathlib import Path

from ezpz_moe.config.older_keys import OLDER_KEYS
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import HOSTS, presumed_host
from ezpz_moe.hosts.host_flags import known_flags
from ezpz_moe.tools.flag_remedies import keys_by_spelling, remedy

_LAUNCHER = "run_train.sh"  # the host's own


@dataclass(frozen=True)
class Finding:
    """A flag, or a variable of ``run_train.sh``, in a script.

    Attributes:
        place: ``file:line``.
        flag: as written, without its value.
        remedy: what to do about it; empty for a flag that the host accepts.
    """

    place: str
    flag: str
    remedy: str = ""


def lint(path: Path, taken: frozenset[str]) -> list[Finding]:
    """Find every trainer flag in a script.

    Args:
        path: the script.
        taken: the host's flags; see :func:`taken_flags`.

    Raises:
        EzpzError: the file cannot be read.
    """
    try:
        # Flags are ASCII in every encoding, so no byte that cannot be read matters. And not
        # splitlines(): it also splits at form feeds, where an editor counts no line.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise EzpzError(f"{path}: cannot be read: {error.strerror}.") from error
    # All words, not only those of a known command: flags are often collected in variables.
    found = [(number, word) for number, line in enumerate(lines, 1) for word in words(line)]
    # Without the host's launcher in the script, a variable of that name is somebody else's.
    launched = any(Path(word).name == _LAUNCHER for _, word in found)
    findings = []
    for number, word in found:
        place = f"{path}:{number}"
        if (flag := _flag(word)) and _section(flag) in _sections():
            findings.append(Finding(place, flag, remedy(_path(flag), taken)))
        # An unknown section is most likely another program's flag: report only a near miss.
        elif flag and (near := get_close_matches(_section(flag), _sections(), n=1, cutoff=0.8)):
            findings.append(Finding(place, flag, f"unknown section: did you mean {near[0]}?"))
        elif launched and (name := word.partition("=")[0]) != word and name in _variables():
            findings.append(Finding(place, f"{name}=", _variable_remedy(name)))
    return findings


def taken_flags() -> frozenset[str]:
    """Return the flags of the installed host, as paths: ``--a.b-c`` is ``a.b_c``.

    Flags behind a subcommand, ``activation-checkpoint:full``, are not flags of the top level.

    Raises:
        EzpzError: no host is installed that this package has a binding for.
    """
    return frozenset(each.name for each in known_flags() if not (each.after or each.is_subcommand))


def words(line: str) -> Iterator[str]:
    """Split one line of a script into words, up to a comment, including those inside quotes.

    A quote may begin or end on another line: what follows it is split into words.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&`")
    lexer.whitespace_split = True
    lexer.commenters = ""  # shlex would also find a comment in ${#array[@]}
    try:
        for word in lexer:
            if word.startswith("#"):
                return
            # A quoted string may hold a whole command line: split it again.
            yield from words(word) if set(word) & set(lexer.whitespace) else [word]
    except ValueError:  # an open quote, or a last backslash: the lexer holds an unfinished word
        yield from words(lexer.token)


def _flag(word: str) -> str:
    """Return the flag in ``--a.b``, ``--a.b=1``, ``ARGS=--a.b`` or ``${X:+--a.b}``; or nothing."""
    # `ARGS=--a.b` and `${X:+--a.b}` hide a flag behind an assignment or a default.
    for mark in ("=", ":-", ":+"):
        before, _, after = word.partition(mark)
        if after.startswith("--") and not before.startswith("--"):
            word = after
    name = word.partition("=")[0].rstrip("}")
    letters = name.replace("-", "").replace("_", "").replace(".", "")
    return name if name.startswith("--") and "." in name and letters.isalnum() else ""


def _path(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _section(flag: str) -> str:
    return _path(flag).partition(".")[0]


def _variable_remedy(name: str) -> str:
    variables = presumed_host().launcher_variables
    if name in variables:
        return ""
    return f"{_LAUNCHER} of {presumed_host().name} takes {' and '.join(variables)}"


@cache
def _variables() -> frozenset[str]:
    """Return the variables of every generation's launcher."""
    return frozenset(chain(*(each.launcher_variables for each in HOSTS)))


@cache
def _sections() -> frozenset[str]:
    """Return the first parts of trainer flags, also of the releases before 0.2."""
    paths = (*keys_by_spelling(), *OLDER_KEYS)
    return frozenset(path.partition(".")[0] for path in paths if "." in path)
