"""Records as a run writes them, from a seeded generator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ezpz_moe.telemetry.record import LayerRecord, StepRecord


def layer(counts, number: int = 1, top_k: int = 1, **changed) -> LayerRecord:
    """A layer with these assignments, and plausible values for all else."""
    values = {
        "layer": number,
        "tokens": int(sum(counts)) // top_k,
        "counts_E": tuple(map(int, counts)),
        "zero_counts_Z": (),
        "top1_probability": 0.25,
        "margin": 0.05,
        "bias_norm": None,
        "losses": {"aux_loss": 1.02},
        "scaled_losses": {"aux_loss": 0.0102},
        "padding_waste": None,
        "drop_rate": None,
    }
    return LayerRecord(**values | changed)


def record(*layers: LayerRecord, step: int = 10, steps: int = 10, **changed) -> StepRecord:
    """A record of these layers."""
    values = {"loss": 6.4, "grad_norm": 0.8, "backend": "for_loop"} | changed
    return StepRecord(step, steps, layers=layers, **values)


def run(
    layers: int = 5,
    experts: int = 8,
    steps: int = 300,
    every: int = 10,
    seed: int = 0,
    top_k: int = 3,
    tokens: int = 4096,
    dead: int = 0,
) -> list[StepRecord]:
    """A run whose router spreads the tokens better and better while the loss falls.

    In the last layer the ``dead`` last experts get no token from the middle of the run on.
    """
    random = np.random.default_rng(seed)
    taste_LE = random.normal(size=(layers, experts))
    records = []
    for step in range(every, steps + 1, every):
        spread = 0.1 + 0.9 * np.exp(-4 * step / steps)
        taste_LE += 0.05 * random.normal(size=taste_LE.shape)
        weights_LE = np.exp(spread * taste_LE)
        if dead and step > steps // 2:
            weights_LE[-1, -dead:] = 0
        share_LE = weights_LE / weights_LE.sum(axis=1, keepdims=True)
        seen = tokens * every
        rows = [
            layer(
                random.multinomial(seen * top_k, share_E),
                number + 1,
                top_k,
                top1_probability=float(share_E.max()),
                losses={"aux_loss": float(experts * (share_E**2).sum()), "z_loss": 0.3},
                scaled_losses={"aux_loss": float(0.01 * experts * (share_E**2).sum())},
                bias_norm=float(0.001 * step),
                padding_waste=float(1 - share_E.mean() / share_E.max()),
            )
            for number, share_E in enumerate(share_LE)
        ]
        loss = 2 + 6 * np.exp(-3 * step / steps) + 0.05 * random.normal()
        records.append(record(*rows, step=step, steps=every, loss=float(loss)))
    return records


def at(record: StepRecord, step: int) -> StepRecord:
    """The same record at another step."""
    return replace(record, step=step)
