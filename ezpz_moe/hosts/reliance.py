"""Describe as data what a binding relies on in the host, and check whether the host has it.

Each generation lists its reliances in a ``relied_on`` module next to its class. The same list
serves the check before a run, the host contract tests, and people.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any

from ezpz_moe.errors import EzpzError

NO_FLAVOR = "no flavor and no job can be trained; torchtitan's own configs still can"
"""The consequence if something is missing that every run of ours needs."""

NO_BACKEND = f"no backend can be bound: {NO_FLAVOR}"

NOTHING_TRAINS = "nothing can be trained with this host"

NO_SIZES = "flavors with sizes of their own cannot be built; those with `base` still can"


@dataclass(frozen=True)
class Reliance:
    """One thing of the host's that the binding uses.

    Attributes:
        thing: ``"module:attribute"``, with a dotted attribute for members; or ``"module"`` alone,
            which is only looked for, and imported only if ``has`` lists something.
        used_for: what the binding does with it.
        if_broken: what its absence means for a user, in plain words.
        has: names that it has.
        takes: names of parameters that it accepts.
        fields: names of fields that the dataclass has.
        sets: names of attributes that the class's ``__init__`` sets.
        vital: nothing can be trained without it, so a run is refused before it starts.
    """

    thing: str
    used_for: str
    if_broken: str
    has: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    vital: bool = False

    def why_broken(self) -> str:
        """Return what the installed host lacks, in one line; empty if the reliance holds."""
        module, _, attribute = self.thing.partition(":")
        try:
            # Only looked for: importing `torchtitan.train` would load the whole trainer.
            if not (attribute or self.has):
                return "" if util.find_spec(module) else f"No module named {module!r}"
            found = import_module(module)
            # hasattr first, for a message with the owner's name; getattr's own varies by type.
            for name in filter(None, attribute.split(".")):
                if not hasattr(found, name):
                    return f"{found.__name__} has no {name}"
                found = getattr(found, name)
            checks = (
                self._names_missing,
                self._parameters_missing,
                self._fields_missing,
                self._attributes_missing,
            )
            return "; ".join(reason for check in checks for reason in check(found))
        except ImportError as error:
            return str(error)
        except Exception as error:  # importing a module of the host's can raise anything
            return in_words(error)

    def _names_missing(self, found: Any) -> Iterator[str]:
        if missing := [name for name in self.has if not hasattr(found, name)]:
            yield f"has no {', '.join(missing)}"

    def _parameters_missing(self, found: Any) -> Iterator[str]:
        if not self.takes:
            return
        # Of a class, these are the parameters of its __init__.
        parameters = inspect.signature(found).parameters
        # It takes every name, so its signature cannot tell.
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        if missing := [name for name in self.takes if name not in parameters]:
            yield f"does not take {', '.join(missing)}, but {', '.join(parameters)}"

    def _fields_missing(self, found: Any) -> Iterator[str]:
        if not self.fields:
            return
        if not dataclasses.is_dataclass(found):
            yield "is not a dataclass"
            return
        known = [field.name for field in dataclasses.fields(found)]
        if missing := [name for name in self.fields if name not in known]:
            yield f"has no field {', '.join(missing)}"

    def _attributes_missing(self, found: Any) -> Iterator[str]:
        """Look at the names in the code: an instance may need what does not exist before a run."""
        if not self.sets:
            return
        # Along the MRO, because a base class's __init__ may set them.
        own = [vars(each).get("__init__") for each in inspect.getmro(found)]
        codes = [getattr(inspect.unwrap(each), "__code__", None) for each in own if each]
        set_here = {name for code in codes if code for name in code.co_names}
        if missing := [name for name in self.sets if name not in set_here]:
            yield f"its __init__ sets no {', '.join(missing)}"


def broken(reliances: Iterable[Reliance]) -> dict[Reliance, str]:
    """Return the reliances that do not hold, each with what the host lacks."""
    reasons = {reliance: reliance.why_broken() for reliance in reliances}
    return {reliance: reason for reliance, reason in reasons.items() if reason}


def is_written(reliance: Reliance) -> bool:
    """Return whether the source of ``"package.module:name"`` defines that name, with its fields.

    It imports nothing.
    """
    # Parsed and not imported: importing the host takes seconds and fixes its device type.
    module, _, name = reliance.thing.partition(":")
    package, _, path = module.partition(".")
    found = util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder, *path.split(".")).with_suffix(".py")
        if file.is_file():
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):  # importing it will report this
                return False
            found_here = [node for node in tree.body if getattr(node, "name", None) == name]
            fields = {
                part.target.id
                for node in found_here
                for part in getattr(node, "body", ())
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            }
            return bool(found_here) and fields.issuperset(reliance.fields)
    return False


def in_words(error: Exception) -> str:
    """Return what the host raised in one line, with its type; our own messages unchanged."""
    words = " ".join(str(error).split())
    return words if isinstance(error, EzpzError) else f"{type(error).__name__}: {words}"
