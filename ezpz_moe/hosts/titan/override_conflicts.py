"""Find overrides that exclude each other, or a flavor. By name: the host applies them later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torchtitan.trainer import Trainer

from ezpz_moe.errors import EzpzError, did_you_mean

_OURS = "ezpz_moe.overrides."
_EXPERTS = f"{_OURS}experts"
_FUSED = "torchtitan.overrides.fused_swiglu.fused_grouped_experts"
_OF_A_FLAVOR = {
    _EXPERTS: (
        "the flavor has already chosen its compute_backend. Remove the override, or choose another "
        "flavor."
    ),
    _FUSED: (
        "it fuses only torchtitan's own experts and would not affect a flavor's. Remove the "
        "override, or train the upstream config (`--module deepseek_v3 ...`) with it."
    ),
}

_NOTHING = {
    _EXPERTS: (
        "the model has no routed experts, so there is nothing to compute. Remove the override, or "
        "choose a Mixture-of-Experts model."
    ),
    f"{_OURS}sdpa": "the model has no attention of torchtitan's. Remove the override.",
    f"{_OURS}checkpointer": (
        "the config has a checkpoint manager of its own, which the override cannot replace. Remove "
        "the override."
    ),
}


def override_problems(config: Trainer.Config) -> Iterator[str]:
    """Yield what is wrong with the overrides of a flavor's run."""
    targets = named(config)
    yield from _twice(targets)
    for target in dict.fromkeys(targets):
        if target in _OF_A_FLAVOR:
            yield f"override.imports {target}: {_OF_A_FLAVOR[target]}"


def refuse_overrides(config: Trainer.Config) -> None:
    """Refuse overrides of the host's own config that it would refuse with a traceback.

    Raises:
        EzpzError: one is named twice, or two replace the routed experts.
    """
    targets = named(config)
    problems = [*_twice(targets)]
    if {_EXPERTS, _FUSED} <= set(targets):
        problems.append(
            f"override.imports {_EXPERTS} and {_FUSED}: both replace the routed experts. Remove "
            "one of them."
        )
    if problems:
        raise EzpzError("\n  ".join(problems))


def refuse_without_effect(config: Trainer.Config, target_of: Mapping[str, type]) -> None:
    """Refuse overrides of ours that would replace nothing in ``config``.

    The host warns of that only if all that are named replace nothing.

    Args:
        target_of: name of an override -> the class of the nodes that it replaces.

    Raises:
        EzpzError: there is no such override, or no such node.
    """
    for name in named(config):
        if name in target_of:
            if not any(True for _ in config.traverse(target_of[name])):
                raise EzpzError(f"override.imports {name}: {_NOTHING[name]}")
        elif name.startswith(_OURS):
            near, known = did_you_mean(name, target_of), ", ".join(target_of)
            raise EzpzError(
                f"override.imports {name}: there is no such override.{near} There are {known}."
            )


def named(config: Trainer.Config) -> list[str]:
    """Return the overrides that the job names, in order, without their keyword arguments."""
    return [each if isinstance(each, str) else each[0] for each in config.override.imports]


def _twice(targets: list[str]) -> Iterator[str]:
    for target in dict.fromkeys(targets):
        if (times := targets.count(target)) > 1:
            yield f"override.imports {target}: named {times} times. Name it once."
