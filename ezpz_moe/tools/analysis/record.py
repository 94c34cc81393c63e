"""Run a checkpoint's model on a text, and record the experts that its routers choose.

The model is the host's own, from its part ``analysis``; forward hooks read what its
routers return. Legend of the suffixes: S = sequences, L = their length, K = experts of a token,
E = experts, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.analysis.similarity import cosines
from ezpz_moe.tools.analysis.text import Sequence as TextSequence
from ezpz_moe.tools.trained import inference, load

Progress = Callable[[Sequence[TextSequence]], Iterable[TextSequence]]


@dataclass(frozen=True)
class Routing:
    """What a layer's router chose.

    Attributes:
        ids_SLK: the experts of every token; E is that of none.
        num_experts: E.
        weights_SLK: what each of them is multiplied by, float32.
    """

    ids_SLK: torch.Tensor
    num_experts: int
    weights_SLK: torch.Tensor


@dataclass(frozen=True)
class Recording:
    """What a checkpoint did with a text.

    Attributes:
        loss: mean cross-entropy of the next token, in nats.
        routing: by layer, starting with the first that has experts.
        cosines: [E, E] between the experts' weights, by layer.
        notes: what the user should know about the weights.
    """

    loss: float
    routing: dict[str, Routing]
    cosines: dict[str, torch.Tensor]
    notes: tuple[str, ...] = ()


def record(
    checkpoint: Path,
    flavor: Flavor,
    text: Sequence[TextSequence],
    *,
    device: str,
    dtype: torch.dtype,
    progress: Progress = iter,
    with_bias: bool = True,
) -> Recording:
    """Run the model of ``flavor`` with the weights in ``checkpoint`` on ``text``.

    Args:
        checkpoint: a DCP checkpoint's folder, or one with safetensors.
        text: at least one sequence, all of one length.
        device, dtype: where and in what the model computes; the host computes experts in bfloat16.
        with_bias: whether the experts' selection biases count.

    Raises:
        EzpzError: the checkpoint is incomplete, or of another generation or model; the host has no
            such slot.
    """
    part = host().analysis()
    loaded = load(checkpoint, flavor, len(text[0].tokens_L), device=device, dtype=dtype)
    model = loaded.model
    if not with_bias:
        _drop_bias(model)
    losses, chosen = [], _Chosen(part.routers(model))
    with inference(), chosen:
        for sequence in progress(text):
            logits_LV = part.forward(
                model, sequence.tokens_L.to(device), sequence.positions_L.to(device)
            )
            labels_L = sequence.labels_L.to(device)
            # In float32: a sum over a vocabulary loses too much in bfloat16.
            losses.append(nn.functional.cross_entropy(logits_LV.float(), labels_L).item())
    similar = {name: cosines(weights).cpu() for name, weights in part.expert_weights(model).items()}
    return Recording(sum(losses) / len(losses), chosen.routing(), similar, loaded.notes)


class _Chosen:
    """Records what the routers choose while entered, sequence by sequence."""

    def __init__(self, routers: dict[str, Any]) -> None:
        self._routers = routers
        self._ids: dict[str, list[torch.Tensor]] = {name: [] for name in routers}
        self._weights: dict[str, list[torch.Tensor]] = {name: [] for name in routers}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, router in self._routers.items():
            self._handles.append(router.register_forward_hook(self._hook(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        part = host().analysis()

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            # To the CPU at once: the ids of a long text would fill the device.
            self._ids[name].append(part.chosen(output).flatten(0, -2).cpu())
            self._weights[name].append(part.weights(output).flatten(0, -2).float().cpu())

        return keep

    def routing(self) -> dict[str, Routing]:
        return {
            name: Routing(
                torch.stack(ids), self._routers[name].num_experts, torch.stack(self._weights[name])
            )
            for name, ids in self._ids.items()
        }


def _drop_bias(model: nn.Module) -> None:
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:  # as no other buffer is
            buffer.zero_()
