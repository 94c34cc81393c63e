"""Overrides as somebody else may have written them, beside ours."""

from torchtitan.config import override
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher


@override(target=LocalTokenDispatcher.Config)
def dispatcher(config):
    return config


@override(target=MoE.Config, fqns=["*layers.2.*"])
def mixture(config):
    return config


@override(target=MoE.Config, fqns=["*decoder.*"])
def mixture_elsewhere(config):
    return config
