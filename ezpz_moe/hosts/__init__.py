"""Bindings to the trainer, one folder per generation of it.

The generation is told by what the installed host has, the newest first, and never by its version:
a snapshot's version says little. A folder has one file per slot (``experts``, ``models``, ``data``,
``job``, ...); :func:`binding` gives the slot of the host at hand.

Only modules below this one import torchtitan. This one imports neither it nor torch by itself.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.reliance import Reliance, broken, in_words
from ezpz_moe.hosts.untested import installed_pair, notice, tested_pairs

logger = logging.getLogger(__name__)

# What a refusal says to install: the newest release that the plugin is developed with.
RECOMMENDED = {"torch": "2.15.0", "torchtitan": "0.3.0"}


@dataclass(frozen=True)
class Generation:
    """A form of the host.

    Attributes:
        folder: its binding, below this package.
        host: its name for people.
        evidence: what this generation has and the older ones lack.
        like: the older generation whose slots serve where this folder has no file of its own.
    """

    folder: str
    host: str
    evidence: Reliance
    like: Generation | None = None

    @property
    def relied_on(self) -> tuple[Reliance, ...]:
        """What the binding needs of the host."""
        return self.slot("relied_on").RELIED_ON

    @property
    def is_written(self) -> bool:
        """Whether the host's files have the evidence; nothing is imported."""
        return _is_written(self.evidence)

    def slots(self) -> dict[str, str]:
        """Name -> module of everything that the binding consists of; nothing is imported."""
        older = self.like.slots() if self.like else {}
        folder = Path(__file__).with_name(self.folder)
        own = {
            each.name: f"{__name__}.{self.folder}.{each.name}" for each in iter_modules([folder])
        }
        return older | own

    def slot(self, name: str) -> ModuleType:
        """The module ``name`` of this generation's binding.

        Raises:
            EzpzError: it has none, or cannot be imported with the installed host.
        """
        module = self.slots().get(name)
        if module is None:
            raise EzpzError(f"ezpz_moe cannot do this with {self.host}: its binding has no {name}.")
        try:
            return importlib.import_module(module)
        except EzpzError:
            raise
        except Exception as error:  # its classes are made from the host's
            titan = installed_pair()[1]
            raise EzpzError(
                f"ezpz_moe cannot do this with torchtitan {titan}: {in_words(error)}. "
                "`ezpz-moe doctor` shows what is broken and what that means."
            ) from error


TITAN_0_3 = Generation(
    "titan_0_3",
    "torchtitan 0.3",
    Reliance(
        "torchtitan.config.override:derive",
        used_for="recognizing the host's generation",
        if_broken="this is older than torchtitan 0.3",
        takes=("source", "target_cls"),
        vital=True,
    ),
)
TITAN_MAIN = Generation(
    "titan_main",
    "torchtitan after 0.3",
    Reliance(
        "torchtitan.config.configs:TrainingConfig",
        used_for="recognizing the host's generation",
        if_broken="this is torchtitan 0.3 or older",
        fields=("max_context_length",),
        vital=True,
    ),
    like=TITAN_0_3,
)
TITAN_GROUPED_LINEAR = Generation(
    "titan_grouped_linear",
    "torchtitan since September 2026",
    Reliance(
        "torchtitan.models.common.linear:GroupedLinear",
        used_for="recognizing the host's generation",
        if_broken="this is torchtitan of August 2026 or older",
        vital=True,
    ),
    like=TITAN_MAIN,
)
TITAN_0_2 = Generation(
    "titan_0_2",
    "torchtitan 0.2",
    Reliance(
        "torchtitan.protocols.train_spec:register_train_spec",
        used_for="recognizing the host's generation",
        if_broken="this is neither torchtitan 0.2 nor 0.3",
        vital=True,
    ),
)
GENERATIONS = (TITAN_GROUPED_LINEAR, TITAN_MAIN, TITAN_0_3, TITAN_0_2)
"""The newest first."""


def presumed_generation() -> Generation:
    """The generation of the installed host by its files: nothing is imported, and nothing refused.

    For what is done before torch is imported, such as reading a job. Without a host,
    torchtitan 0.3.
    """
    return next((each for each in GENERATIONS if each.is_written), TITAN_0_3)


@cache
def generation() -> Generation:
    """The generation of the installed host, which is imported for it.

    Raises:
        EzpzError: the host is of no generation that has a binding, cannot be imported, or is not
            installed.
    """
    try:
        _choose_device()
    except EzpzError:
        raise
    except Exception as error:  # whatever the host's module raises when it is imported
        raise _refusal([f"choosing its device: {in_words(error)}"]) from error
    reasons = []
    for candidate in GENERATIONS:
        if not (reason := candidate.evidence.why_broken()):
            return candidate
        reasons.append(f"{candidate.evidence.thing}: {reason}")
    raise _refusal(reasons)


def binding(slot: str) -> ModuleType:
    """A slot of the installed host's binding: ``binding("job").trainer_config``.

    Raises:
        EzpzError: as :func:`generation`.
    """
    return generation().slot(slot)


def check_host() -> None:
    """Refuse a torch or torchtitan that the binding cannot work with.

    Call it before anything of the host is imported: where no accelerator exists, the host is
    imported here, with the CPU as its device. A pair that works but is untested is logged, once a
    day.

    Raises:
        EzpzError: something that nothing can be trained without is missing.
    """
    vital = [reliance for reliance in generation().relied_on if reliance.vital]
    if missing := broken(vital):
        raise _refusal(_with_meanings(missing))
    if line := notice():
        logger.warning("ezpz_moe: %s", line)


def _with_meanings(missing: Mapping[Reliance, str]) -> list[str]:
    """What is missing, and after all that means the same, what it means."""
    by_meaning: dict[str, list[str]] = {}
    for line, reason in missing.items():
        by_meaning.setdefault(line.if_broken, []).append(f"{line.thing}: {reason}")
    return [f"{'; '.join(lines)} ({meaning})" for meaning, lines in by_meaning.items()]


def _is_written(evidence: Reliance) -> bool:
    """Whether the source of ``"package.module:name"`` defines it, a class with its fields."""
    module, _, name = evidence.thing.partition(":")
    package, _, path = module.partition(".")
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder, *path.split(".")).with_suffix(".py")
        if file.is_file():
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):  # whoever imports it gets told
                return False
            found_here = [node for node in tree.body if getattr(node, "name", None) == name]
            fields = {
                part.target.id
                for node in found_here
                for part in getattr(node, "body", ())
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            }
            return bool(found_here) and fields.issuperset(evidence.fields)
    return False


def _choose_device() -> None:
    from ezpz_moe.hosts.cpu import import_host_on_cpu, no_accelerator

    if no_accelerator():
        import_host_on_cpu()


def _refusal(reasons: Iterable[str]) -> EzpzError:
    install = " ".join(f"'{name}=={number}'" for name, number in RECOMMENDED.items())
    versions = (
        f"{name} {version or 'not installed'}"
        for name, version in zip(RECOMMENDED, installed_pair(), strict=True)
    )
    return EzpzError(
        f"ezpz_moe cannot work with {' and '.join(versions)}: "
        f"{'; '.join(dict.fromkeys(reasons))}. Tested: {tested_pairs()}. "
        f"Install with: pip install {install}"
    )
