"""Check the trainer's flags on a command line, before torch and the host are imported.

The trainer itself would refuse them too, after twenty seconds. Of a host whose flags are not
shipped (:mod:`ezpz_moe.hosts.releases`) nothing is known here, and it does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from ezpz_moe.config.job import is_slip
from ezpz_moe.config.older_keys import OLDER_KEYS
from ezpz_moe.errors import EzpzError, did_you_mean, printable, short
from ezpz_moe.hosts.command_line import HostFlag
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.releases import facts
from ezpz_moe.tools.flag_remedies import keys_by_spelling, remedy
from ezpz_moe.tools.flag_values import given, needs_a_value, wrong_value

_FEW = 3
"""Flags of several sections with one name: of more, such as --enable, none is likelier."""


def refuse_wrong_flags(words: Sequence[str], ours: Collection[str]) -> None:
    """Refuse flags that the installed host does not take, and values that it cannot read.

    Args:
        words: what is left of a command line without our own options.
        ours: our own options of that command, such as ``--nproc``, for the nearest name.

    Raises:
        EzpzError: names every such flag, and what to write instead.
    """
    known = facts()
    if known is None:
        return
    if problems := list(_Words(known.flags, ours).problems(words)):
        lines = problems if len(problems) == 1 else [f"{len(problems)} wrong flags", *problems]
        raise EzpzError("\n  ".join(lines))


class _Words:
    """The words that a host takes, behind each subcommand.

    Args:
        flags: of the host.
        ours: our own options.
    """

    def __init__(self, flags: Sequence[HostFlag], ours: Collection[str]) -> None:
        self._ours = ours
        self._subcommands = {each.name for each in flags if each.is_subcommand}
        self._behind: dict[str, dict[str, HostFlag]] = {"": {}}
        for flag in flags:
            if not flag.is_subcommand:
                self._behind.setdefault(flag.after, {})[flag.name] = flag

    def problems(self, words: Sequence[str]) -> Iterator[str]:
        """Yield a line for each word that the host would refuse."""
        behind = ""
        for each in given(words):
            known = self._behind.get(behind, {})
            flag = known.get(_path(each.name)) or _switched(each.name, known)
            left = each.values
            if each.name and flag is None:
                yield self._unknown(each.name, behind)
                # Whatever follows may be its values.
                left = [word for word in left if word in self._subcommands]
            elif flag is not None:
                taken = _taken(flag, each.values)
                yield from _wrong_values(flag, each.name, each.values[:taken])
                left = each.values[taken:]
            for word in left:
                if word in self._subcommands:
                    behind = word
                elif flag is not None and not flag.type:
                    either = f"{flag.option} or {_off(flag)}"
                    yield f"{short(printable(each.name))}: takes no value. Write {either}."
                else:
                    yield self._stray(word, each.name)

    def _unknown(self, name: str, behind: str) -> str:
        path, said = _path(name), short(printable(name))
        elsewhere = [after for after, flags in self._behind.items() if path in flags]
        if behind and "" in elsewhere:
            return f"{said}: write it before {behind}, which only its own flags may follow."
        if elsewhere:
            return f"{said}: write it after one of {', '.join(sorted(elsewhere))}."
        top = self._behind[""]
        key = _turned_on(path)
        if (key in keys_by_spelling() or key in OLDER_KEYS) and (why := remedy(path, top)):
            return f"{said}: {presumed_host().name} has no such flag: {why.rstrip('.')}."
        return (
            f"{said}: neither the trainer ({presumed_host().name}) nor this command has such a "
            f"flag.{self._nearest(name)}"
        )

    def _nearest(self, name: str) -> str:
        options = [flag.option for flags in self._behind.values() for flag in flags.values()]
        switches = [_off(flag) for flag in self._behind[""].values() if not flag.type]
        # Names alike can do the opposite: only a slip of the pen is taken for another flag.
        name = name.replace("_", "-")
        slips = [each for each in (*self._ours, *options, *switches) if is_slip(name, each)]
        # A name without its section means another flag than the one with the most letters in
        # common.
        meant = [each for each in options if each.rpartition(".")[2] == name.lstrip("-")]
        if 0 < len(meant) <= _FEW:
            return f" Did you mean {' or '.join(map(repr, meant))}?"
        return did_you_mean(name, slips)

    def _stray(self, word: str, before: str) -> str:
        near = did_you_mean(word, self._subcommands)
        after = f" after {short(printable(before))}" if before else ""
        return f"{short(printable(word))}{after}: the trainer takes no such word.{near}"


def _taken(flag: HostFlag, values: Sequence[str]) -> int:
    """Return how many of the words behind a flag are its values."""
    if not flag.type:
        return 0
    return len(values) if flag.many else 1


def _wrong_values(flag: HostFlag, name: str, values: Sequence[str]) -> Iterator[str]:
    # What takes many has a syntax of its own.
    if flag.many or not flag.type:
        return
    if not values:
        yield needs_a_value(name, flag.type)
    elif wrong := wrong_value(name, values[0], flag.type):
        yield wrong


def _path(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _switched(name: str, known: Mapping[str, HostFlag]) -> HostFlag | None:
    """Return the switch that ``--section.no-name`` turns off."""
    flag = known.get(_turned_on(_path(name)))
    return flag if flag is not None and not flag.type else None


def _turned_on(path: str) -> str:
    section, dot, last = path.rpartition(".")
    return f"{section}{dot}{last.removeprefix('no_')}"


def _off(flag: HostFlag) -> str:
    section, dot, last = flag.option.rpartition(".")
    return f"{section}{dot}no-{last}"
