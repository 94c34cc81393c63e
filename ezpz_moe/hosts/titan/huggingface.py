"""Convert between the host's parameters and Hugging Face's, with the host's own adapter."""

from __future__ import annotations

from typing import Any

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.gpt_oss_adapter import GptOssAdapter
from ezpz_moe.hosts.titan.models import host_spec
from ezpz_moe.hosts.titan.parameters import build_on_meta


def adapter(flavor: Flavor) -> Any:
    """Return the flavor's ``StateDictAdapter``, with ``to_hf`` and ``from_hf``.

    Raises:
        EzpzError: the host has none for this model.
    """
    # The host's model and not ours: the adapter matches on names, and our classes do not change
    # them.
    spec = host_spec(flavor)
    if spec.state_dict_adapter is None:
        raise EzpzError(f"{flavor.source}: torchtitan has no Hugging Face adapter for this model.")
    own = spec.state_dict_adapter(spec.model, None)
    if spec.name == "gpt_oss":
        return GptOssAdapter(own, build_on_meta(flavor).state_dict())
    return own
