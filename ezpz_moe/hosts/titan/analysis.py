"""Provide what ``ezpz-moe analyze`` needs: the host's model, routers, experts and tokenizer.

Legend of the suffixes: L = sequence length, V = vocabulary, B = batch, K = experts per token,
E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config.configs import TrainingConfig
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.common.moe import MoE
from torchtitan.trainer import Trainer

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.job_files import missing_files, vocabulary_problems
from ezpz_moe.hosts.titan.attention import has_masked_attention, use_sdpa
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.models import model_spec
from ezpz_moe.hosts.titan.router import moe_layers

# Of a routed layer, but of none of its experts: constant ones, and the matrices of a latent.
_OF_THE_LAYER = ("constant_experts.", "descend.", "ascend.")


def longest(flavor: Flavor) -> int:
    """Return how many tokens a sequence may have: what the model's rotary positions reach."""
    return getattr(model_spec(flavor).model, titan().LONGEST)


def build(flavor: Flavor, length: int, *, device: str, one_document: bool = False) -> nn.Module:
    """Build the flavor's model on ``device``, with the host's settings for sequences of ``length``.

    Args:
        one_document: whether every sequence is one document. Attention then needs no mask between
            them and is SDPA, where FlexAttention would compile anew for each length.

    Raises:
        EzpzError: the host refuses the model or the length.
    """
    spec = model_spec(flavor)
    if one_document:
        use_sdpa(spec.model)
    training: Any = {titan().LENGTH.rpartition(".")[2]: length}
    try:
        config = Trainer.Config(model_spec=spec, training=TrainingConfig(**training))
        # As the trainer does: the model takes the sequence length from here, and may refuse it.
        spec.model.update_from_config(config=config)
    except ValueError as error:
        raise EzpzError(f"{flavor.source}: torchtitan refuses this: {error}") from error
    titan().fit_model(config)
    with torch.device("meta"):
        model = spec.model.build()
    model.to_empty(device=device)
    # Weights are initialised although a checkpoint may follow: buffers such as RoPE's tables are
    # not in it.
    with torch.no_grad():
        model.init_states(buffer_device=torch.device(device))
    # On the model, because `forward` gets nothing else from `build`.
    model.is_masked = has_masked_attention(spec)
    return model


def forward(model: Any, tokens_L: torch.Tensor, positions_L: torch.Tensor) -> torch.Tensor:
    """Return the logits [L, V] of one sequence."""
    shape = titan().one_sequence(len(tokens_L))
    tokens, positions = tokens_L.reshape(shape), positions_L.reshape(shape)
    inputs = {"positions": positions}
    # The host builds masks in the trainer's loop and not in the model, so a caller of the model has
    # to.
    if model.is_masked:
        inputs["attention_masks"] = model.get_attention_masks(positions=positions)
    # [1, L, V] has a batch of one; where the host folds it, nothing is flattened.
    return model(tokens, **inputs).flatten(0, -2)


def routers(model: nn.Module) -> dict[str, Any]:
    """Return the router of each layer with experts, by layer name; it has ``num_experts``."""
    return {name: moe.router for name, moe in _moes(model).items()}


def chosen(output: Any) -> torch.Tensor:
    """Return the experts in a router's output: [..., K]."""
    _, topk_expert_ids_BLK, _ = output
    return topk_expert_ids_BLK


def weights(output: Any) -> torch.Tensor:
    """Return the weights that a router's output gives to the experts in it: [..., K]."""
    topk_scores_BLK, _, _ = output
    return topk_scores_BLK


def expert_weights(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return the routed experts' parameters [E, ...] by layer name, no others of their layer."""
    return {
        name: [
            each.detach()
            for key, each in moe.routed_experts.named_parameters()
            if not key.startswith(_OF_THE_LAYER)
        ]
        for name, moe in _moes(model).items()
    }


def at_step(model: nn.Module, step: int) -> None:
    """Set what a flavor schedules, its router's temperature, to its value at a training step."""
    for moe in moe_layers([model]).values():
        moe.router.at_step(step)


def tokenizer(folder: str, flavor: Flavor) -> HuggingFaceTokenizer:
    """Return the host's tokenizer.

    Args:
        folder: ``hf_assets_path``, which contains the tokenizer.
        flavor: that of the model, whose vocabulary has to contain every ID of the tokenizer.

    Raises:
        EzpzError: there is no tokenizer, or it can give IDs that the model does not have.
    """
    build = partial(HuggingFaceTokenizer.Config().build, tokenizer_path=folder)
    vocabulary = decoder_vocab_size(model_spec(flavor))
    problems = [
        *missing_files(folder, None),
        *vocabulary_problems(build, folder, vocabulary, flavor.name),
    ]
    if problems:
        raise EzpzError(problems[0])
    return build()


def encoder(folder: str, flavor: Flavor) -> Callable[[str], list[int]]:
    """Return a function that encodes a document, with the beginning and end marks of the trainer.

    Raises:
        EzpzError: as :func:`tokenizer`.
    """
    return partial(tokenizer(folder, flavor).encode, add_bos=True, add_eos=True)


def _moes(model: nn.Module) -> dict[str, MoE]:
    """Return the layers with experts by name, such as "layers.1"."""
    return {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, MoE)
    }
