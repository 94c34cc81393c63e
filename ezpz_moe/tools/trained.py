"""Find a trained model's weights, and load them into the host's own module."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.checkpoints import contents, storage
from ezpz_moe.tools.checkpoints.huggingface.importing import Importable, check_importable
from ezpz_moe.tools.checkpoints.huggingface.model import model_of
from ezpz_moe.tools.checkpoints.tensors import read_whole


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and what the user should know about them."""

    model: nn.Module
    notes: tuple[str, ...]


def load(
    folder: Path,
    flavor: Flavor,
    length: int,
    *,
    device: str,
    dtype: torch.dtype,
    one_document: bool = False,
) -> Loaded:
    """Build the flavor's model for inference, with the weights in ``folder``.

    Args:
        folder: from :func:`.find_weights`.
        length: tokens of a sequence, at most.
        device, dtype: where and in what the model computes; the host computes experts in bfloat16.
        one_document: whether every sequence is one document, which needs no mask between them.

    Raises:
        EzpzError: the weights are incomplete, or of another generation or model; the host has no
            such slot, or refuses the model or the length; torch has no such device.
    """
    part = host().analysis()
    _check_device(device)
    model = part.build(flavor, length, device=device, one_document=one_document)
    state, step = model.state_dict(), None
    notes: tuple[str, ...] = ()
    if (folder / storage.METADATA).is_file():
        read = _of_checkpoint(folder, state)
        # A model alone may lie in a folder of any name: then its step is after every schedule.
        step = contents.step(folder, storage.read_metadata(folder))
    else:
        importable = _importable(folder, flavor)
        read, notes = importable.read, importable.notes
    # Layer by layer: the weights are never in memory as a whole. Not tensor by tensor, and not
    # into the tensors of the state dict: a host may fuse the queries', keys' and values' weights,
    # and make the state dict's from a copy.
    for names in _by_layer(state).values():
        # strict=False: a call has one layer's only. The names of all have been compared.
        loaded = model.load_state_dict({name: read(name) for name in names}, strict=False)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
    # Schedules of the router (its temperature) depend on the step.
    part.at_step(model, sys.maxsize if step is None else step)
    for parameter in model.parameters():  # but no buffers: rotary positions may be complex
        parameter.data = parameter.data.to(dtype)
    # Routers add jitter only in training.
    return Loaded(model.eval(), notes)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Compute without gradients, and without the host's remark about its gate on a CPU."""
    with torch.inference_mode(), warnings.catch_warnings():
        # The host asks for float32 in the gate, which the CPU's autocast ignores with a warning.
        warnings.filterwarnings("ignore", message="In CPU autocast")
        yield


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # torch raises an AssertionError for a device that it was not built for.
    except (AssertionError, RuntimeError) as error:
        raise EzpzError(f"--device {device!r}: {str(error).splitlines()[0]}") from error


def _of_checkpoint(
    checkpoint: Path, state: Mapping[str, torch.Tensor]
) -> Callable[[str], torch.Tensor]:
    """Check a DCP checkpoint; return what reads a tensor of it."""
    metadata = contents.metadata_of_model(checkpoint, host().checkpoint_names, state)
    return lambda name: read_whole(checkpoint, metadata, name)


def _importable(folder: Path, flavor: Flavor) -> Importable:
    return check_importable(folder, model_of(host(), flavor))


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"layers\.\d+\.", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return groups
