"""Mistakes in the words of a command line, each in one line with the nearest name that exists."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ezpz_moe.cli.command import OF_ALL
from ezpz_moe.cli.signature import Argument, actions_of, arguments_of
from ezpz_moe.errors import EzpzError, did_you_mean, printable, short

HELP = ("--help", "-h")
_OF_ALL = (*(f"--{name}" for name in OF_ALL), *HELP)


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
        near = _command_meant(name) or did_you_mean(name, known)
        raise EzpzError(f"there is no command {short(printable(name))}.{near} See ezpz-moe --help.")
    actions = [action for action, _ in actions_of(known[name])]
    if actions and more and more[0] not in actions:
        raise EzpzError(
            f"{name}: there is no {short(printable(more[0]))}.{did_you_mean(more[0], actions)} "
            f"It has {', '.join(actions)}."
        )
    if actions and not more and not any(option in arguments for option in HELP):
        raise EzpzError(f"{name}: name one of {', '.join(actions)}. See ezpz-moe {name} --help.")
    return name


def _command_meant(name: str) -> str:
    if name == "help":
        return " Did you mean ezpz-moe --help?"
    if name.endswith(".toml"):
        return f" Did you mean ezpz-moe train {short(printable(name))}?"
    return ""


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
    found = [each.name for each in arguments_of(command) if not each.positional]
    return [*found, *(option for _, action in actions_of(command) for option in options(action))]


@contextlib.contextmanager
def in_one_line(arguments: Sequence[str], name: str, command: type) -> Iterator[None]:
    """Say in one line what tyro refuses, instead of its box.

    tyro tells nobody what it found, except by printing. So the words are looked at again, but only
    once it has refused them: nothing that it takes can be refused here.

    Raises:
        EzpzError: an argument is missing, or has a value that it does not take.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        if not stop.code:  # help
            raise
        actions = dict(actions_of(command))
        for action in (word for word in arguments if word in actions):
            name, command = f"{name} {action}", actions[action]
            break
        from ezpz_moe.hosts.command_line import text_of_box

        said = _refusal(arguments, name, list(arguments_of(command)))
        said = said or f"{text_of_box(box.getvalue())}."
        raise EzpzError(f"{name}: {said} See ezpz-moe {name} --help.") from None
    sys.stderr.write(box.getvalue())


def _refusal(arguments: Sequence[str], name: str, takes: Sequence[Argument]) -> str:
    """Return what is wrong with words that tyro refuses; empty if it is something else."""
    from ezpz_moe.tools.flag_values import given, needs_a_value, wrong_value

    flags = {each.name: each for each in takes if not each.positional}
    positional = [each for each in takes if each.positional]
    wrong, words, named = [], [], set()
    for each in given(arguments):
        flag = flags.get(each.name.replace("_", "-"))
        if flag is None:
            # What follows a flag of the trainer's is its value.
            words += each.values if each.name in ("", *_OF_ALL) else []
            continue
        named.add(flag.name)
        number = len(each.values) if flag.many else min(len(each.values), bool(flag.type))
        if flag.type and not flag.many and not number:
            wrong.append(needs_a_value(each.name, flag.type))
        wrong += [wrong_value(each.name, value, flag.type) for value in each.values[:number]]
        words += each.values[number:]
    words = words[len(name.split()) :]
    wrong += [
        wrong_value("", word, each.type) for each, word in zip(positional, words, strict=False)
    ]
    if found := list(filter(None, wrong)):
        return found[0]
    there = {*named, *(each.name for each in positional[: len(words)])}
    needed = [each for each in takes if each.required]
    if missing := [each.name for each in needed if each.name not in there]:
        listed = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        usage = " ".join(each.usage for each in needed)
        verb = "is" if len(missing) == 1 else "are"
        return f"{listed} {verb} missing. Write ezpz-moe {name} {usage}."
    return ""
