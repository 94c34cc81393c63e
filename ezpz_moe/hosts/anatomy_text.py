"""What a model consists of, as text: for ``ezpz-moe describe``, and for the log of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ezpz_moe.config.layer_sizes import in_words
from ezpz_moe.hosts.accounting import Anatomy
from ezpz_moe.telemetry.text import count, flops


def title(flavor: str, anatomy: Anatomy, seq_len: int) -> str:
    """Return the line above the table: the model's experts, and what its FLOPs are counted for."""
    counted = f"FLOPs are per token, in a sequence of {seq_len}."
    if not anatomy.n_moe_layers:
        return f"{flavor}: {anatomy.n_layers} layers, all dense. {counted}"
    zero = f" and {anatomy.zero_experts} zero-computation experts" if anatomy.zero_experts else ""
    return (
        f"{flavor}: {anatomy.n_layers} layers, {anatomy.n_moe_layers} of them with "
        f"{in_words(anatomy.num_experts)} experts{zero}; a token uses {in_words(anatomy.top_k)}. "
        f"{counted}"
    )


def rows(anatomy: Anatomy) -> Iterator[Mapping[str, str]]:
    """Yield a row for every component, and one for their total."""
    total = anatomy.total
    for name, cost in [*anatomy.in_order.items(), ("total", total)]:
        yield {
            "component": name,
            "parameters": count(cost.parameters),
            # A mean: with zero-computation experts, tokens use different numbers of parameters.
            "active": count(round(cost.active)),
            "forward FLOPs": flops(cost.forward),
            "backward FLOPs": flops(cost.backward),
            "FLOPs": flops(cost.both),
            "share": f"{cost.both / total.both:.1%}",
        }


def caveats(anatomy: Anatomy) -> Iterator[str]:
    """Yield lines about what the figures are averages of, and what they leave out."""
    if anatomy.zero_experts:
        yield (
            f"{anatomy.computing_experts:.2f} of a token's {in_words(anatomy.top_k)} experts "
            f"compute on average, if all {in_words(anatomy.num_experts)} + {anatomy.zero_experts} "
            "are used equally."
        )
    if "vision encoder" in anatomy.costs:
        yield "Not counted: the vision encoder's FLOPs, which depend on patches, not tokens."
    if anatomy.uncounted:
        yield f"Not counted: the FLOPs of {', '.join(anatomy.uncounted)}."
