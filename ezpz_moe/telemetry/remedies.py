"""What an alert advises, made from what the run does already.

A run's settings are those of its flavor's ``[router]`` and ``[balance]`` that differ from their
defaults, by table and key, and the rate at which biases move.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ezpz_moe.config.routing_schema import LOSSES, SCOPES, Router
from ezpz_moe.config.schema import Data

Settings = Mapping[str, Any]

_RATE = "balance.bias_rate"


def settings_of(router: Data, balance: Data, bias_rate: float | None) -> dict[str, Any]:
    """Return a run's settings from its flavor's tables and its model's rate for the biases."""
    settings = {} if bias_rate is None else {_RATE: bias_rate}
    for table, data in {"router": router, "balance": balance}.items():
        changed = data.model_dump(mode="json", exclude_defaults=True)
        settings |= {f"{table}.{key}": value for key, value in _flat(changed)}
    return settings


def remedy(kind: str, settings: Settings, warmup_steps: int, *, has_bias: bool) -> str:
    """Return what can be done about ``"dead"`` experts, a ``"rising"`` CV, or ``"collapse"``.

    Args:
        settings: the run's.
        warmup_steps: those of its learning rate, 0 if it has none or they are not known.
        has_bias: whether the layers choose with a selection bias.
    """
    if settings.get("router.freeze"):
        return "the gate is frozen, and learns nothing: remove [router] freeze"
    if settings.get("router.routing") == "balanced":
        return (
            'routing = "balanced" leaves it to chance: lower [router] noise or '
            "skip_first_n_experts, or remove routing"
        )
    balance, small = _balance(settings, has_bias), _small_logits(settings)
    if kind == "dead":
        return f"{balance}; {_jitter(settings)}lower the learning rate if they died early"
    if kind == "rising":
        return f"{balance}; {small}; lower the learning rate or {_longer(warmup_steps)}"
    return (
        f"go back to a checkpoint from before it; {balance}; {small}; {_jitter(settings)}lower the "
        "learning rate"
    )


def _balance(settings: Settings, has_bias: bool) -> str:
    """Advise what pulls tokens to idle experts. Sinkhorn excludes all of it."""
    if settings.get("router.routing") == "sinkhorn":
        return _sinkhorn(settings)
    losses = _above_zero(settings, "aux_loss") | _above_zero(settings, "mse_loss")
    loss = _raise(losses) if losses else _set(settings, "aux_loss = 0.01")
    if not has_bias:
        return f'{loss} or bias_update = "sign"'
    faster = _raise({_RATE: settings.get(_RATE)})
    # The model's own update, whose rate counts only beside bias_update.
    named = "" if "balance.bias_update" in settings else ' with bias_update = "sign"'
    return f"{loss} or {faster}{named}"


def _sinkhorn(settings: Settings) -> str:
    """Advise more iterations where they help: no record says whether the plan was even."""
    iterations, tolerance = (
        json.dumps(settings.get(f"router.{key}", Router.model_fields[key].default))
        for key in ("sinkhorn_iterations", "sinkhorn_tolerance")
    )
    return (
        f"raise [router] sinkhorn_iterations above its {iterations} if so many do not make the "
        f"plan even (sinkhorn_tolerance = {tolerance}); in an even plan, too, tokens with nearly "
        "the same scores choose the same experts"
    )


def _small_logits(settings: Settings) -> str:
    losses = _above_zero(settings, "z_loss")
    loss = _raise(losses) if losses else _set(settings, "z_loss = 0.001")
    return f"{loss} to keep the logits small"


def _jitter(settings: Settings) -> str:
    """Advise jitter unless there is some: more of it only makes the choice random."""
    if settings.get("router.jitter_noise"):
        return ""
    return "set [router] jitter_noise = 0.01 to let some tokens try other experts; "


def _longer(warmup_steps: int) -> str:
    return f"warm it up for more than {warmup_steps} steps" if warmup_steps else "warm it up longer"


def _set(settings: Settings, loss: str) -> str:
    """Return ``set [balance] z_loss = 0.001``, or in the table of a scope that has losses.

    A loss in [balance] has a scope too, and its losses stand in one place or the other.
    """
    of_tables = sorted(key for key, value in settings.items() if value and _is_of_scope(key))
    has_own = any(settings.get(f"balance.{each}") for each in LOSSES)
    table = of_tables[0].rpartition(".")[0] if of_tables and not has_own else "balance"
    return f"set [{table}] {loss}"


def _is_of_scope(key: str) -> bool:
    return key.startswith(tuple(f"balance.{scope}." for scope in SCOPES))


def _raise(settings: Settings) -> str:
    """Return ``raise [balance] aux_loss above its 0.01``, of all these settings."""
    return " or ".join(
        f"raise [{key.rpartition('.')[0]}] {key.rpartition('.')[2]}{_above(value)}"
        for key, value in settings.items()
    )


def _above(value: Any) -> str:
    # A schedule, or not known, has no single number.
    return f" above its {json.dumps(value)}" if isinstance(value, int | float) else ""


def _above_zero(settings: Settings, name: str) -> dict[str, Any]:
    """Return the coefficients of a loss that are in force, of whatever scope."""
    return {
        key: value
        for key, value in settings.items()
        if key.startswith("balance.") and key.endswith(f".{name}") and value
    }


def _flat(node: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Return ``("a.b", value)`` for all that is nested; a schedule is one value."""
    pairs: list[tuple[str, Any]] = []
    for key, value in node.items():
        name = f"{path}.{key}" if path else key
        if not isinstance(value, dict):
            pairs.append((name, value))
        elif "steps" in value:
            pairs.append((name, value["end"] if value["start"] == value["end"] else value))
        else:
            pairs += _flat(value, name)
    return pairs
