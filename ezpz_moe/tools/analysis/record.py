"""Run a checkpoint's model on a text, and record the experts that its routers choose.

The model is the host's own, from its part ``analysis``; forward hooks read what its
routers return. Legend of the suffixes: S = sequences, L = their length, K = experts of a token,
E = experts, V = vocabulary.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.analysis.similarity import cosines
from ezpz_moe.tools.analysis.text import Sequence as TextSequence
from ezpz_moe.tools.checkpoints import contents, storage
from ezpz_moe.tools.checkpoints.tensors import read_whole

Progress = Callable[[Sequence[TextSequence]], Iterable[TextSequence]]


@dataclass(frozen=True)
class Routing:
    """What a layer's router chose.

    Attributes:
        ids_SLK: the experts of every token.
        num_experts: E.
    """

    ids_SLK: torch.Tensor
    num_experts: int


@dataclass(frozen=True)
class Recording:
    """What a checkpoint did with a text.

    Attributes:
        loss: mean cross-entropy of the next token, in nats.
        routing: by layer, starting with the first that has experts.
        cosines: [E, E] between the experts' weights, by layer.
    """

    loss: float
    routing: dict[str, Routing]
    cosines: dict[str, torch.Tensor]


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
        checkpoint: a DCP checkpoint's folder.
        text: at least one sequence, all of one length.
        device, dtype: where and in what the model computes; the host computes experts in bfloat16.
        with_bias: whether the experts' selection biases count.

    Raises:
        EzpzError: the checkpoint is incomplete, or of another generation or model; the host has no
            such slot.
    """
    part = host().analysis()
    model = part.build(flavor, len(text[0].tokens_L), device=device)
    _load(checkpoint, model)
    if not with_bias:
        _drop_bias(model)
    # Schedules of the router (its temperature) depend on the step.
    part.at_step(model, _step(checkpoint))
    for parameter in model.parameters():  # but no buffers: rotary positions may be complex
        parameter.data = parameter.data.to(dtype)
    # Routers add jitter only in training.
    model.eval()
    losses, chosen = [], _Chosen(part.routers(model))
    with torch.inference_mode(), chosen, warnings.catch_warnings():
        # The host asks for float32 in the gate, which the CPU's autocast ignores with a warning.
        warnings.filterwarnings("ignore", message="In CPU autocast")
        for sequence in progress(text):
            logits_LV = part.forward(
                model, sequence.tokens_L.to(device), sequence.positions_L.to(device)
            )
            labels_L = sequence.labels_L.to(device)
            # In float32: a sum over a vocabulary loses too much in bfloat16.
            losses.append(nn.functional.cross_entropy(logits_LV.float(), labels_L).item())
    similar = {name: cosines(weights).cpu() for name, weights in part.expert_weights(model).items()}
    return Recording(sum(losses) / len(losses), chosen.routing(), similar)


class _Chosen:
    """Records what the routers choose while entered, sequence by sequence."""

    def __init__(self, routers: dict[str, Any]) -> None:
        self._routers = routers
        self._ids: dict[str, list[torch.Tensor]] = {name: [] for name in routers}
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

        return keep

    def routing(self) -> dict[str, Routing]:
        return {
            name: Routing(torch.stack(ids), self._routers[name].num_experts)
            for name, ids in self._ids.items()
        }


def _load(checkpoint: Path, model: nn.Module) -> None:
    """Copy a checkpoint's tensors into the model."""
    metadata = storage.read_metadata(checkpoint)
    storage.check_data(checkpoint, metadata)
    generation = host().checkpoint_names
    if (found := contents.generation(checkpoint, metadata)) != generation:
        raise EzpzError(
            f"{checkpoint}: has the names of torchtitan {found}. First run: ezpz-moe ckpt remap "
            f"{checkpoint} DIR --to {generation}"
        )
    entries, state = dict(contents.model_tensors(metadata)), model.state_dict()
    contents.check_model(checkpoint, {name: entry.size for name, entry in entries.items()}, state)
    # Layer by layer: the checkpoint is never in memory as a whole. Not tensor by tensor, and not
    # into the tensors of the state dict: a host may fuse the queries', keys' and values' weights,
    # and make the state dict's from a copy.
    for names in _by_layer(state).values():
        # strict=False: a call has one layer's only. check_model() has compared the names of all.
        loaded = model.load_state_dict(
            {name: read_whole(checkpoint, metadata, name) for name in names}, strict=False
        )
        assert not loaded.unexpected_keys, loaded.unexpected_keys


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"layers\.\d+\.", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return groups


def _drop_bias(model: nn.Module) -> None:
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:  # as no other buffer is
            buffer.zero_()


def _step(checkpoint: Path) -> int:
    """Return the checkpoint's step; if it is not known, one after every schedule's end."""
    step = contents.step(checkpoint, storage.read_metadata(checkpoint))
    return sys.maxsize if step is None else step
