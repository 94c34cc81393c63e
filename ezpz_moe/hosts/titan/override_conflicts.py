"""Find overrides that exclude each other, or a flavor, before the host looks at them.

A flavor refuses overrides by name. Those of the host's own configs are compared by the nodes that
they replace, as the host compares them, whoever made them: the host would raise ``ValueError``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from itertools import combinations

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
        EzpzError: one is named twice, or two replace the same node, or one a part of the other's.
    """
    problems = [*_twice(named(config)), *_overlapping(replaced_nodes(config))]
    if problems:
        raise EzpzError("\n  ".join(problems))


def replaced_nodes(config: Trainer.Config) -> dict[str, set[str]]:
    """Return the overrides that the job names -> names of the nodes that they would replace.

    It imports their modules, as the host does next. What it cannot find is left to the host to say.
    """
    return {name: set(_nodes_of(config, name)) for name in dict.fromkeys(named(config))}


def _nodes_of(config: Trainer.Config, name: str) -> Iterator[str]:
    try:
        importlib.import_module(name.rpartition(".")[0])
    except (ImportError, ValueError):  # the latter: no module is named
        return
    # Private: the host offers no way to an override by its name. The module's name is also that of
    # a function in its package, which `from` would import.
    host_overrides = importlib.import_module("torchtitan.config.override")
    override = getattr(host_overrides, "_REGISTRY", {}).get(name)
    if override is None:
        return
    for node_name, node, _, _ in config.traverse(override.target_cls):
        is_meant = not override.exact or type(node) is override.target_cls
        if is_meant and override.matches(node_name):
            yield node_name


def _overlapping(nodes_of: Mapping[str, set[str]]) -> Iterator[str]:
    for names in combinations(nodes_of, 2):
        one, other = (nodes_of[name] for name in names)
        if both := one & other:
            yield (
                f"override.imports {names[0]} and {names[1]}: both replace {min(both)}. Remove one "
                "of them."
            )
            continue
        for whole, part in (names, names[::-1]):
            if inner := [each for each in nodes_of[part] if is_inside(each, nodes_of[whole])]:
                yield (
                    f"override.imports {whole} and {part}: the first replaces a node that "
                    f"contains {min(inner)}, which the second replaces. Remove one of them."
                )


def is_inside(node: str, others: set[str]) -> bool:
    """Return whether one of ``others`` contains the node of that name."""
    return any(node.startswith(f"{other}.") for other in others)


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
