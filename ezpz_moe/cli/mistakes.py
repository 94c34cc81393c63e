"""Mistakes in the words of a command line, each in one line with the nearest name that exists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from tyro.conf import Positional, Suppress

from ezpz_moe.cli.command import OF_ALL
from ezpz_moe.errors import EzpzError, did_you_mean, printable, short

_OF_ALL = (*(f"--{name}" for name in OF_ALL), "--help", "-h")

# What tyro looks for in an annotation.
_NO_OPTION = (*get_args(Positional[int])[1:], *get_args(Suppress[int])[1:])


def refuse_unknown_command(arguments: Sequence[str], known: Mapping[str, type]) -> str:
    """Return the command that a command line names, after checking that it is one.

    Raises:
        EzpzError: it names none, or an option before it or a word after it does not exist.
    """
    words = [argument for argument in arguments if not argument.startswith("-")]
    for option in arguments[: arguments.index(words[0]) if words else None]:
        if option not in _OF_ALL:
            near = did_you_mean(option, _OF_ALL)
            raise EzpzError(
                f"there is no option {short(printable(option))}.{near} See ezpz-moe --help."
            )
    if not words:
        raise EzpzError(f"name a command: {', '.join(known)}. See ezpz-moe --help.")
    name, *more = words
    if name not in known:
        near = did_you_mean(name, known)
        raise EzpzError(f"there is no command {short(printable(name))}.{near} See ezpz-moe --help.")
    actions = [action for action, _ in _actions(known[name])]
    if actions and more and more[0] not in actions:
        raise EzpzError(
            f"{name}: there is no {short(printable(more[0]))}.{did_you_mean(more[0], actions)} "
            f"It has {', '.join(actions)}."
        )
    return name


def refuse_unknown_options(arguments: Sequence[str], name: str, command: type) -> None:
    """Refuse an option that neither this command nor all of them have.

    Raises:
        EzpzError: there is one.
    """
    known = [*options(command), *_OF_ALL]
    for argument in arguments:
        option = argument.partition("=")[0]
        # No option has a space in its name: that is a value, such as the text of a prompt.
        if not option.startswith("--") or re.search(r"\s", option):
            continue
        if option.replace("_", "-") not in known:
            near = did_you_mean(option.replace("_", "-"), known)
            said = short(printable(option))
            raise EzpzError(f"{name}: there is no option {said}.{near} See ezpz-moe {name} --help.")


def refuse_words(left: Sequence[str], name: str, command: type) -> None:
    """Refuse words of the command line that the command has no place for.

    Raises:
        EzpzError: there are some.
    """
    if left:
        file = " To write a file, use --out." if "--out" in options(command) else ""
        said = short(printable(left[0]))
        raise EzpzError(f"{name}: has no place for {said}.{file} See ezpz-moe {name} --help.")


def refuse_flags_of_trainer(command: Any) -> None:
    """Refuse flags that the trainer would refuse, before anything heavy is imported.

    Raises:
        EzpzError: the trainer does not take them, or not with these values.
    """
    if words := getattr(command, "host_flags", ()):
        from ezpz_moe.tools.trainer_flags import refuse_wrong_flags

        refuse_wrong_flags(words, [*options(type(command)), *_OF_ALL])


def options(command: type) -> list[str]:
    """Return the options of a command, and of the actions in it, such as ``ckpt inspect``."""
    hints = get_type_hints(command, include_extras=True)
    found = []
    for each in fields(command):
        extras = getattr(hints[each.name], "__metadata__", ())
        if not any(extra is marker for extra in extras for marker in _NO_OPTION):
            name = _name(extras) or each.name
            found.append(f"--{name.replace('_', '-')}")
    return [*found, *(option for _, action in _actions(command) for option in options(action))]


def _actions(command: type) -> Iterator[tuple[str, type]]:
    """Yield the subcommands of a command by name."""
    hints = get_type_hints(command, include_extras=True)
    for each in fields(command):
        for member in get_args(hints[each.name]):
            kind, extras = getattr(member, "__origin__", None), getattr(member, "__metadata__", ())
            if isinstance(kind, type) and is_dataclass(kind) and (name := _name(extras)):
                yield name, kind


def _name(extras: Iterable[Any]) -> str | None:
    """Return the name that a field's ``arg()`` or ``subcommand()`` gives it."""
    return next((name for extra in extras if (name := getattr(extra, "name", None))), None)
