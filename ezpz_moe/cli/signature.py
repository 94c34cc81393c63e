"""What a command takes, read from the fields of its dataclass, as tyro reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional, Suppress

# What tyro looks for in an annotation.
_POSITIONAL, _SUPPRESS = (get_args(each)[1:] for each in (Positional[int], Suppress[int]))
_NUMBERS = {int: "INT", float: "FLOAT"}


@dataclass(frozen=True)
class Argument:
    """An argument of a command.

    Attributes:
        name: as the help has it: ``--device``, or ``JOB.toml`` of a positional one.
        type: what one value is: ``INT``, ``{cpu,cuda}``, ``FILE``; empty for a switch.
        positional: whether it has no flag.
        many: whether it takes any number of values, even none.
        required: whether it has to be given.
    """

    name: str
    type: str
    positional: bool
    many: bool
    required: bool

    @property
    def usage(self) -> str:
        """As it is written: ``JOB.toml``, ``--data FILE``."""
        return self.name if self.positional else f"{self.name} {self.type}".rstrip()


def arguments_of(command: type) -> Iterator[Argument]:
    """Yield the arguments of a command, without those of the actions in it."""
    hints = get_type_hints(command, include_extras=True)
    for each in fields(command):
        hint = hints[each.name]
        extras = getattr(hint, "__metadata__", ())
        if _has(extras, _SUPPRESS) or any(_actions_in(hint)):
            continue
        annotation = get_args(hint)[0] if extras else hint
        many = get_origin(annotation) is tuple
        metavar = next((said for extra in extras if (said := getattr(extra, "metavar", None))), "")
        positional = _has(extras, _POSITIONAL)
        name = _name(extras) or each.name
        yield Argument(
            metavar or name.upper() if positional else f"--{name.replace('_', '-')}",
            _type(get_args(annotation)[0] if many else annotation, metavar),
            positional,
            many,
            required=each.default is MISSING and not many,
        )


def actions_of(command: type) -> Iterator[tuple[str, type]]:
    """Yield the subcommands of a command by name."""
    for hint in get_type_hints(command, include_extras=True).values():
        yield from _actions_in(hint)


def _actions_in(hint: Any) -> Iterator[tuple[str, type]]:
    for member in get_args(hint):
        kind, extras = getattr(member, "__origin__", None), getattr(member, "__metadata__", ())
        if isinstance(kind, type) and is_dataclass(kind) and (name := _name(extras)):
            yield name, kind


def _type(annotation: Any, metavar: str) -> str:
    """Return what one value is; of numbers and choices their own words say more than a metavar."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (each for each in get_args(annotation) if each is not NoneType)
    if get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation))}}}"
    if annotation is bool:
        return ""
    return _NUMBERS.get(annotation) or metavar or ("STR" if annotation is str else "PATH")


def _has(extras: Iterable[Any], markers: Iterable[Any]) -> bool:
    return any(extra is marker for extra in extras for marker in markers)


def _name(extras: Iterable[Any]) -> str | None:
    """Return the name that a field's ``arg()`` or ``subcommand()`` gives it."""
    return next((name for extra in extras if (name := getattr(extra, "name", None))), None)
