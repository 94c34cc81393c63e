"""Replace removed experts by constant ones, which compute next to nothing: ``--as-constant``.

A constant expert outputs ``a x + b v`` with ``(a, b) = softmax(mix x)``, as in
:mod:`ezpz_moe.routing.gate`. No mix makes a zero for every x, so this is not the removed expert's
mean: the mix points along the mean of its tokens, where b is nearly 1, and v is the vector with
which the squares of what is then missing add up to least. The gate keeps the row of each.

Legend of the suffixes: n = sampled tokens of an expert, D = model dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute.arguments import Biases
from ezpz_moe.compute.plain import plain_loop
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.analysis.text import Sequence as TextSequence
from ezpz_moe.tools.checkpoints.expert_rows import is_stack
from ezpz_moe.tools.trained import inference, load

_SAMPLE = 256
"""Tokens of each expert, at most. As numbers, that is a fraction of what its weights are."""
_STEEPNESSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""The logit of b at the mean token, that of a being 0. The one that misses least is taken."""


@dataclass(frozen=True)
class Sample:
    """Tokens that chose an expert: x_nD, and the weights w_n that its output got."""

    x_nD: Tensor
    w_n: Tensor


@dataclass(frozen=True)
class Constant:
    """A constant expert in the place of a removed one.

    Attributes:
        mix_2D: makes the shares of the token and of the vector.
        vector_D: v.
        missing: what the expert gave to its sampled tokens and this does not, in squares.
        output: the squares of all that it gave.
    """

    mix_2D: Tensor
    vector_D: Tensor
    missing: float
    output: float


def constant_for(sample: Sample, y_nD: Tensor, gate_D: Tensor) -> Constant:
    """Return the constant expert that comes nearest to an expert's outputs, all in float64.

    Args:
        sample: tokens that chose it; perhaps none.
        y_nD: its outputs for them.
        gate_D: its row of the gate: where its tokens are if there are none to see.
    """
    x_nD, w_n1 = sample.x_nD.double(), sample.w_n.double().unsqueeze(-1)
    D = len(gate_D)
    if not len(x_nD):
        along_D = _STEEPNESSES[-1] * torch.nn.functional.normalize(gate_D.double(), dim=0)
        return Constant(torch.stack((torch.zeros(D), along_D)), torch.zeros(D), 0.0, 0.0)
    mean_D = x_nD.mean(0)
    y_nD = y_nD.double()
    found = []
    for steepness in _STEEPNESSES:
        mix_2D = torch.stack((torch.zeros_like(mean_D), steepness * mean_D / mean_D.dot(mean_D)))
        a_n1, b_n1 = (x_nD @ mix_2D.T).softmax(-1).split(1, dim=-1)
        rest_nD = y_nD - a_n1 * x_nD
        # Least squares: what a token misses is multiplied by the weight of the expert.
        vector_D = (w_n1**2 * b_n1 * rest_nD).sum(0) / (w_n1 * b_n1).square().sum()
        missing = (w_n1 * (rest_nD - b_n1 * vector_D)).square().sum().item()
        found.append(Constant(mix_2D, vector_D, missing, (w_n1 * y_nD).square().sum().item()))
    return min(found, key=lambda one: one.missing)


def constants(
    folder: Path,
    flavor: Flavor,
    text: Sequence[TextSequence],
    removed: Mapping[str, Sequence[int]],
    *,
    device: str,
    progress: Any = iter,
) -> dict[str, list[Constant]]:
    """Return the constant experts for those that are removed, by layer, in their order.

    Args:
        folder: the checkpoint's.
        flavor: of its model.
        text: what the model is run on.
        removed: numbers of experts by layer.
        device: where the model computes.

    Raises:
        EzpzError: as :func:`~ezpz_moe.tools.trained.load`.
    """
    part = host().analysis()
    model = load(folder, flavor, len(text[0].tokens_L), device=device, dtype=torch.float32).model
    samplers = {
        name: _Sampler(removed[name], router) for name, router in part.routers(model).items()
    }
    with inference():
        for sequence in progress(text):
            part.forward(model, sequence.tokens_L.to(device), sequence.positions_L.to(device))
        state = model.state_dict()
        return {
            name: [_fitted(state, name, flavor, sampler, e) for e in removed[name]]
            for name, sampler in samplers.items()
        }


class _Sampler:
    """Keeps the first tokens that choose each of some experts of a router."""

    def __init__(self, experts: Iterable[int], router: Any) -> None:
        self._kept: dict[int, list[Sample]] = {e: [] for e in experts}
        router.register_forward_hook(self._keep)

    def _keep(self, _: Any, inputs: tuple[Any, ...], output: Any) -> None:
        part = host().analysis()
        x_TD = inputs[0].flatten(0, -2)
        ids_TK, weights_TK = (of(output).flatten(0, -2) for of in (part.chosen, part.weights))
        for e, kept in self._kept.items():
            left = _SAMPLE - sum(len(each.w_n) for each in kept)
            tokens_n, choices_n = (ids_TK == e).nonzero(as_tuple=True)
            tokens_n, choices_n = tokens_n[:left], choices_n[:left]
            kept.append(Sample(x_TD[tokens_n].float(), weights_TK[tokens_n, choices_n].float()))

    def of(self, expert: int) -> Sample:
        """Return the tokens of one of the experts."""
        kept = self._kept[expert]
        return Sample(torch.cat([s.x_nD for s in kept]), torch.cat([s.w_n for s in kept]))


def _fitted(
    state: Mapping[str, Tensor], layer: str, flavor: Flavor, sampler: _Sampler, expert: int
) -> Constant:
    sample = sampler.of(expert)
    own = {
        name.rpartition(".")[2]: tensor[expert : expert + 1].float()
        for name, tensor in state.items()
        if name.startswith(f"{layer}.") and is_stack(name)
    }
    biases = Biases(own["b1_EF"], own["b2_ED"], own.get("b3_EF")) if "b1_EF" in own else None
    y_nD = plain_loop(
        own["w1_EFD"],
        own["w2_EDF"],
        own.get("w3_EFD"),
        sample.x_nD,
        torch.tensor([len(sample.x_nD)]),
        activation=flavor.expert_activation,
        biases=biases,
    )
    gate_D = state[f"{layer}.moe.router.gate.weight"][expert]
    on_cpu = Sample(sample.x_nD.cpu(), sample.w_n.cpu())
    return constant_for(on_cpu, y_nD.cpu(), gate_D.cpu())
