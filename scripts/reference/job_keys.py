"""Every key of a job: its type, its default, torchtitan 0.3's flag, and whether 0.2 has it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tables

from ezpz_moe.config.job import allowed, shown
from ezpz_moe.config.keys import Key, Keys
from ezpz_moe.hosts.command_line import HostFlag
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.host_flags import known_flags
from ezpz_moe.hosts.titan.job_keys import KEYS
from ezpz_moe.hosts.titan.job_keys_2026_08 import KEYS as KEYS_2026_08
from ezpz_moe.hosts.titan.models import host_spec
from ezpz_moe.hosts.titan_0_2.job_keys import KEYS as KEYS_0_2

PAGE = "docs/reference/job.md"
HOST = "0.3"
"""The generation whose defaults and flags the page has."""

Flags = Mapping[str, list[HostFlag]]
"""The trainer's flags by path: several where some follow a word, such as a mode."""

_MODE = "activation_checkpoint.mode"
_MODES = "activation-checkpoint:"
_COMM_BACKEND = "parallelism.expert_parallel_comm_backend"

# What the host's own help does not say, or says of a flag that takes more than the key.
_IN_OUR_WORDS = {
    "activation_checkpoint.experts": "What becomes of the experts' products under `selective`; "
    "not set: kept if they [fit](../guides/backends.md)",
    "activation_checkpoint.mode": "What is computed again in backward rather than kept",
    "compile.backend": "The backend of torch.compile",
    "job.description": "For people; nothing reads it",
    "model.flavor": "The model: a [flavor](flavors.md), with a variant",
    "model.hf_assets_path": "The folder with tokenizer.json; by default our small one",
    "model.name": "`ezpz_moe`, which finds the flavor",
    "optimizer.beta1": "Adam's first decay rate",
    "optimizer.beta2": "Adam's second decay rate",
    "optimizer.eps": "Added to Adam's denominator",
    "optimizer.lr": "The learning rate, at the end of the warm-up",
    "optimizer.name": "The optimizer",
    "optimizer.weight_decay": "The weights' decay",
    "parallelism.expert_parallel_comm_backend": "How tokens travel under expert parallelism",
    "training.dataset": "The text: [your data](../guides/data.md)",
    "training.dataset_path": "Where it is: a folder, a file, or what the data set takes",
    "validation.dataset": "The held-out text",
    "validation.dataset_path": "Where it is",
    "train_only.experts": 'Which experts learn, by layer, or `"all"`, or a file of shares: '
    "[the guide](../guides/experts.md#train-some-of-them)",
    "train_only.router": "Whether the gates of all layers learn too",
    "train_only.share": "Of a file: so much of a layer's tokens the experts have that learn; 0.2",
    "train_only.anchor": "Coefficient of the loss that keeps tokens with the experts that learn",
}


def made() -> dict[str, dict[str, str]]:
    """Return the tables by document and name.

    Raises:
        RuntimeError: another generation is installed than the one that the page is about.
    """
    if presumed_host().generation != HOST:
        raise RuntimeError(f"{PAGE} is made with torchtitan {HOST}: {presumed_host().name} is here")
    flags: dict[str, list[HostFlag]] = {}
    for flag in known_flags():
        flags.setdefault(flag.name, []).append(flag)
    return {
        PAGE: {
            "keys": _sections(KEYS, flags),
            "gone": tables.markdown(_gone()),
            "since August 2026": tables.markdown(_newer()),
        }
    }


def _sections(keys: Keys, flags: Flags) -> str:
    parts = []
    for section, rows in keys.items():
        taken = {name: key for name, key in rows.items() if not key.message}
        if taken:
            lines = (_row(section, name, key, flags) for name, key in taken.items())
            parts.append(f"### `[{section}]`\n\n{tables.markdown(lines)}")
    return "\n" + "\n".join(parts) + "\n"


def _row(section: str, name: str, key: Key, flags: Flags) -> dict[str, str]:
    full = f"{section}.{name}"
    path, number = _path(key, flags)
    of_host = flags.get(path, [])
    return {
        "key": f"`{name}`",
        "type": allowed(key),
        "default": _default(full, key, of_host, number, flags),
        "meaning": _meaning(full, of_host),
        "torchtitan 0.2": _in_0_2(section, name, key),
        "torchtitan 0.3": _flag(full, of_host, number),
    }


def _path(key: Key, flags: Flags) -> tuple[str, int | None]:
    """Return the flag's path for a key, and which of the flag's values it is, if it has several."""
    path = key.path or key.flag or ""
    parent, _, last = path.rpartition(".")
    return (parent, int(last)) if last.isdigit() and parent in flags else (path, None)


def _meaning(name: str, of_host: list[HostFlag]) -> str:
    if name.startswith("telemetry."):
        return "Takes the place of [the flavor's key](metrics.md)"
    return _IN_OUR_WORDS.get(name) or _first_sentence(of_host)


def _first_sentence(flags: list[HostFlag]) -> str:
    """Return what the host says of a flag, up to the first full stop or list."""
    help_ = flags[0].help if flags else ""
    sentence = re.split(r"\.(?=\s+[A-Z]|$)|\s-\s|: (?=-)|\s(?=This is used)", help_, maxsplit=1)[0]
    return sentence.strip().replace("|", r"\|")


def _default(name: str, key: Key, of_host: list[HostFlag], number: int | None, flags: Flags) -> str:
    if name in ("model.name", "model.flavor"):
        return "required"
    if name == _MODE:  # the host's help has the mode of the default first
        first = next(each for each in flags if each.startswith(_MODES))
        return f"`{shown(first.removeprefix(_MODES).replace('-', '_'))}`"
    if name == _COMM_BACKEND:  # an argument of the host's model builders
        return f"`{shown(inspect.signature(host_spec).parameters['moe_comm_backend'].default)}`"
    text = of_host[0].default if of_host else ""
    if number is not None:
        text = text.split()[number]
    return f"`{_as_toml(text, key)}`" if text not in ("", "None") else ""


def _as_toml(text: str, key: Key) -> str:
    """Write a flag's default as a job's TOML has it."""
    words = allowed(key)
    if "list" in words:
        return shown([each for each in text.strip("'").split(",") if each])
    if words == "true or false":
        return text.lower()
    return text if "number" in words or "integer" in words else shown(text.strip("'"))


def _flag(name: str, of_host: list[HostFlag], number: int | None) -> str:
    if name == _MODE:
        return f"`{_MODES}MODE`"
    if not of_host:
        return ""
    option = f"`{of_host[0].option}`"
    if number is not None:
        return f"{option}, number {number + 1}"
    after = [each.after for each in of_host if each.after]
    words = f"`{after[0]}`" if len(after) == 1 else f"`{_MODES}MODE`"
    return f"{words}, then {option}" if after else option


def _in_0_2(section: str, name: str, key: Key) -> str:
    old = KEYS_0_2.get(section, {}).get(name)
    if old is None:
        return "no"
    if old.message:
        return f"no; takes {_values(old.unless)}" if old.unless else "no"
    return "yes" if allowed(old) == allowed(key) else f"yes: {allowed(old)}"


def _gone() -> Iterator[dict[str, str]]:
    """Yield a row for the keys of a section that are gone for the same reason."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for section, rows in KEYS.items():
        for name, key in rows.items():
            if key.message:
                alike.setdefault((section, key.message, _values(key.unless)), []).append(name)
    for (section, message, unless), names in alike.items():
        keys = ", ".join(f"`{name}`" for name in names)
        yield {"section": f"`[{section}]`", "keys": keys, "taken as": unless, "why": message}


def _newer() -> Iterator[dict[str, str]]:
    """Yield a row for each key that hosts since August 2026 take otherwise."""
    for section, rows in KEYS_2026_08.items():
        for name, key in rows.items():
            if key != KEYS.get(section, {}).get(name):
                flag = f"--{(key.path or key.flag or '').replace('_', '-')}"
                yield {
                    "key": f"`{section}.{name}`",
                    "type": "" if key.message else allowed(key),
                    "the trainer's flag": "" if key.message else f"`{flag}`",
                    "why it is gone": key.message,
                }


def _values(values: tuple[Any, ...]) -> str:
    return ", ".join(f"`{shown(value)}`" for value in values)
