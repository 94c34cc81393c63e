"""Find overrides that exclude each other, or a flavor. By name: the host applies them later."""

from __future__ import annotations

from collections.abc import Iterator

from torchtitan.trainer import Trainer

from ezpz_moe.errors import EzpzError

_EXPERTS = "ezpz_moe.overrides.experts"
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


def override_problems(config: Trainer.Config) -> Iterator[str]:
    """Yield what is wrong with the overrides of a flavor's run."""
    targets = _targets(config)
    yield from _twice(targets)
    for target in dict.fromkeys(targets):
        if target in _OF_A_FLAVOR:
            yield f"override.imports {target}: {_OF_A_FLAVOR[target]}"


def refuse_overrides(config: Trainer.Config) -> None:
    """Refuse overrides of the host's own config that it would refuse with a traceback.

    Raises:
        EzpzError: one is named twice, or two replace the routed experts.
    """
    targets = _targets(config)
    problems = [*_twice(targets)]
    if {_EXPERTS, _FUSED} <= set(targets):
        problems.append(
            f"override.imports {_EXPERTS} and {_FUSED}: both replace the routed experts. Remove "
            "one of them."
        )
    if problems:
        raise EzpzError("\n  ".join(problems))


def _targets(config: Trainer.Config) -> list[str]:
    return [each if isinstance(each, str) else each[0] for each in config.override.imports]


def _twice(targets: list[str]) -> Iterator[str]:
    for target in dict.fromkeys(targets):
        if (times := targets.count(target)) > 1:
            yield f"override.imports {target}: named {times} times. Name it once."
