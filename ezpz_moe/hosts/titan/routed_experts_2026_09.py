"""Why a routed layer of torchtitan since September 2026 stays composed.

Its ``RoutedExperts`` is the experts module itself, with gate and up in one matrix: another binding,
which there is not yet.
"""

from ezpz_moe.config.flavor_schema import Routed


def why_composed(routed: Routed) -> str:
    """Return why, for the log. ``routed`` is the flavor's."""
    if routed == "composed":
        return "asked for"
    return "this torchtitan has gate and up in one matrix"
