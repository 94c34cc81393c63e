"""What the host and transformers know of a model, and its parameters in the host's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.host import Host
from ezpz_moe.tools.checkpoints.huggingface.config import TransformersClass, transformers_class
from ezpz_moe.tools.checkpoints.huggingface.files import Files, read_tensors

Keys = Mapping[str, torch.Size]
"""Hugging Face's tensors that hold a parameter."""


@dataclass(frozen=True)
class Model:
    """What the host knows of a model, and what the user said about it.

    Attributes:
        generation: the one that uses these parameter names.
        adapter: the host's, with ``to_hf`` and ``from_hf``.
        tensors: its parameters and buffers on the meta device, by name.
        buffers: the names that are buffers: the experts' selection biases.
        flavor: the model's.
        form: the class of transformers; None if the binding cannot tell.
        tokenizer: the folder of the job's tokenizer; None to export without one.
    """

    generation: str
    adapter: Any
    tensors: Mapping[str, torch.Tensor]
    buffers: frozenset[str]
    flavor: Flavor
    form: TransformersClass | None = None
    tokenizer: Path | None = None

    def keys(self, name: str) -> Keys:
        """Return Hugging Face's tensors that hold a parameter; empty if none does."""
        try:
            to_hf = self.adapter.to_hf({name: self.tensors[name]})
        except KeyError:  # some of the host's adapters leave out what they do not know, others fail
            return {}
        return {key: tensor.shape for key, tensor in to_hf.items()}

    @property
    def loses_biases(self) -> bool:
        """Whether the class of transformers has no place for selection biases.

        The host's adapter of deepseek_v3 names them for DeepseekV2 too, which has none.
        """
        return self.form is not None and not self.form.biases

    def native(self, folder: Path, files: Files, name: str, keys: Keys) -> torch.Tensor:
        """Make a parameter in the host's form from its tensors; zeros without any.

        Raises:
            EzpzError: a tensor cannot be read, is quantized, or has another shape.
        """
        expected = self.tensors[name]
        if not keys:
            return torch.zeros(expected.shape, dtype=expected.dtype)
        tensor = self.adapter.from_hf(dict(read_tensors(folder, files, keys)))[name]
        if tensor.shape != expected.shape:
            raise EzpzError(
                f"{folder}: gives {name} the shape {list(tensor.shape)}, but the flavor's model "
                f"has {list(expected.shape)}."
            )
        return tensor.contiguous()


def model_of(host: Host, flavor: Flavor, tokenizer: Path | None = None) -> Model:
    """Ask the installed host about a flavor's model."""
    model, architecture = host.build_on_meta(flavor), host.architecture(flavor)
    return Model(
        generation=host.checkpoint_names,
        adapter=host.adapter(flavor),
        tensors=(tensors := model.state_dict()),
        # named_buffers() lists also those that no checkpoint has, such as rotary tables.
        buffers=frozenset(name for name, _ in model.named_buffers()) & tensors.keys(),
        flavor=flavor,
        form=transformers_class(architecture) if architecture else None,
        tokenizer=tokenizer,
    )


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        tensors: how many were written.
        left_out: those without a counterpart.
        notes: what the user should know about the result.
    """

    tensors: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()
