"""Convert between the host's parameters and Hugging Face's, with the host's own adapter."""

from __future__ import annotations

from typing import Any

from torchtitan.protocols.train_spec import get_train_spec

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.gpt_oss_adapter import GptOssAdapter
from ezpz_moe.hosts.titan_0_2.models import host_model, model_args
from ezpz_moe.hosts.titan_0_2.parameters import build_on_meta


def adapter(flavor: Flavor) -> Any:
    """Return the flavor's ``StateDictAdapter``, with ``to_hf`` and ``from_hf``.

    Raises:
        EzpzError: the host has none for this model.
    """
    own = get_train_spec(host_model(flavor)).state_dict_adapter
    if own is None:
        raise EzpzError(f"{flavor.source}: torchtitan has no Hugging Face adapter for this model.")
    converts = own(model_args(flavor), None)
    if host_model(flavor) == "gpt_oss":
        return GptOssAdapter(converts, build_on_meta(flavor).state_dict())
    return converts
