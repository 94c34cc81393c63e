"""What a binding relies on in the host, as data, and whether the installed host has it.

Each generation lists its reliances in ``ezpz_moe/hosts/<generation>/relied_on.py``. The one list
serves the check before a run, the host contract tests, and people.
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reliance:
    """One thing of the host's that the binding uses.

    Attributes:
        thing: ``"module:attribute"``, with a dotted attribute for members.
        used_for: what the binding does with it.
        if_broken: what its absence means for a user, in plain words.
        takes: names of parameters that it accepts.
        fields: names of fields that the dataclass has.
        vital: without it nothing can be trained, so that a run is refused before it starts.
    """

    thing: str
    used_for: str
    if_broken: str
    takes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    vital: bool = False

    def why_broken(self) -> str:
        """What the installed host lacks, in one line; empty when the reliance holds."""
        try:
            found = pkgutil.resolve_name(self.thing)
        except (ImportError, AttributeError) as error:
            return str(error)
        return "; ".join([*self._parameters_missing(found), *self._fields_missing(found)])

    def _parameters_missing(self, found: Any) -> Iterator[str]:
        if not self.takes:
            return
        parameters = inspect.signature(found).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        if missing := [name for name in self.takes if name not in parameters]:
            yield f"does not take {', '.join(missing)}, but {', '.join(parameters)}"

    def _fields_missing(self, found: Any) -> Iterator[str]:
        if not self.fields:
            return
        known = [field.name for field in dataclasses.fields(found)]
        if missing := [name for name in self.fields if name not in known]:
            yield f"has no field {', '.join(missing)}"


def broken(reliances: Iterable[Reliance]) -> dict[Reliance, str]:
    """The reliances that do not hold, each with what the host lacks."""
    reasons = {reliance: reliance.why_broken() for reliance in reliances}
    return {reliance: reason for reliance, reason in reasons.items() if reason}
