"""Experts that multiply beside the seam are refused: the log would name a backend that does not.

On torchtitan 0.3 and of August 2026. ``test_titan_0_2.py`` and ``test_titan_2026_09.py`` have what
the others check, whose seams are elsewhere.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from dialect import ON_0_2, SINCE_2026_09
from quantized_weights import WRAPPERS, Wrapped, wrap_weights
from torch import nn

from ezpz_moe.errors import EzpzError

if ON_0_2 or SINCE_2026_09:
    pytest.skip("the seam of this host is another", allow_module_level=True)

from torchtitan.config.override import derive
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.overrides.fused_swiglu import FusedGroupedExperts

from ezpz_moe.hosts.titan.experts import selected

HOSTS_OWN = (GroupedExperts, GptOssGroupedExperts, FusedGroupedExperts)
QUANTIZED = r"computes the experts' products itself \(quantized grouped GEMM"
REMEDY = "Remove the quantization converter of the experts, or do not select a backend."


def config(kind: type) -> GroupedExperts.Config:
    return kind.Config(dim=32, hidden_dim=48, num_experts=4)


def refused(kind: type, backend: str = "for_loop") -> str:
    with pytest.raises(EzpzError) as error:
        selected(config(kind), backend, "a test")
    assert str(error.value).startswith(f"compute_backend '{backend}' (a test): {kind.__name__} ")
    return str(error.value)


def changed(base: type, **members) -> type:
    """A class of experts made of ``base``, with a config of its own, as converters make it."""

    class Changed(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            pass

    for name, member in members.items():
        setattr(Changed, name, member)
    return Changed


def after_init(base: type, change) -> type:
    """As ``base``, but ``change(module)`` is the end of its constructor."""

    def __init__(self, config):
        base.__init__(self, config)
        change(self)

    return changed(base, __init__=__init__)


@pytest.mark.parametrize("kind", HOSTS_OWN)
def test_the_hosts_own_classes_compute_in_the_seam(kind):
    random = torch.get_rng_state()
    assert selected(config(kind), "for_loop", "a test").compute_backend == "for_loop"
    assert torch.equal(torch.get_rng_state(), random)


class Tagged(nn.Parameter):
    """Has a name and attributes of its own, and computes as any other parameter."""


HARMLESS = {
    "class of parameter": lambda self: setattr(self, "w1_EFD", Tagged(self.w1_EFD.data)),
    "parametrization": lambda self: nn.utils.parametrizations.weight_norm(self, "w1_EFD"),
    "reads a norm": lambda self: self.register_forward_hook(lambda _m, _x, y: y.norm().item()),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_leaves_the_products_alone_is_no_reason_to_refuse(what):
    kind = after_init(GroupedExperts, HARMLESS[what])
    assert selected(config(kind), "for_loop", "a test").compute_backend == "for_loop"


@pytest.mark.parametrize("backend", ["for_loop", "grouped_mm"])
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("base", [GroupedExperts, GptOssGroupedExperts])
def test_wrapped_weights_are_refused_in_the_words_of_a_taken_seam(base, how, backend):
    """The float8 converter makes such a class, and leaves the seam alone."""
    said = refused(after_init(base, lambda experts: wrap_weights(experts, how)), backend)
    assert "quantized grouped GEMM: its weights are " in said
    assert said.endswith(REMEDY)
    taken = refused(changed(base, _grouped_mm=lambda self, *, A, B_t, offs: None), backend)
    assert taken.endswith(f"itself (quantized grouped GEMM). {REMEDY}")


def own_forward(self, x_RD, num_tokens_per_expert_E):
    offs_E = torch.cumsum(num_tokens_per_expert_E, 0, dtype=torch.int32)
    h_RF = torch._grouped_mm(x_RD.bfloat16(), self.w1_EFD.bfloat16().mT, offs=offs_E)
    return torch._grouped_mm(F.silu(h_RF), self.w2_EDF.bfloat16().mT, offs=offs_E)


def first_matrix_elementwise(self, x_RD, num_tokens_per_expert_E):
    """Only w3 and w2 go through the seam."""
    offs_E = torch.cumsum(num_tokens_per_expert_E, 0, dtype=torch.int32)
    h_RF = (x_RD.unsqueeze(1) * self.w1_EFD[0]).sum(-1)
    up_RF = self._grouped_mm(A=x_RD.bfloat16(), B_t=self.w3_EFD.bfloat16().mT, offs=offs_E)
    h_RF = F.silu(h_RF) * up_RF
    return self._grouped_mm(A=h_RF.bfloat16(), B_t=self.w2_EDF.bfloat16().mT, offs=offs_E)


def wraps_in_forward(self, x_RD, num_tokens_per_expert_E):
    return GroupedExperts.forward(self, x_RD.as_subclass(Wrapped), num_tokens_per_expert_E)


def computes_again(experts, args, y_RD):
    x_RD, counts_E = args
    return own_forward(experts, x_RD, counts_E)


def reads_values(self, x_RD, num_tokens_per_expert_E):
    return torch.cat(x_RD.split(num_tokens_per_expert_E.tolist()))


BY_ITSELF = {
    "forward": (changed(GroupedExperts, forward=own_forward), "aten::_grouped_mm, beside"),
    "hook": (
        after_init(GroupedExperts, lambda self: self.register_forward_hook(computes_again)),
        "aten::_grouped_mm, beside",
    ),
    "all but one": (
        changed(GroupedExperts, forward=first_matrix_elementwise),
        "weights that are never multiplied there",
    ),
    "wrapped rows": (changed(GroupedExperts, forward=wraps_in_forward), QUANTIZED),
    "seam of the instance": (
        after_init(GroupedExperts, lambda self: vars(self).update(_grouped_mm=own_forward)),
        QUANTIZED,
    ),
    "fails": (changed(GroupedExperts, forward=reads_values), "fails in a trial on the meta device"),
}


@pytest.mark.parametrize("how", BY_ITSELF)
def test_products_beside_the_seam_are_found_by_trying(how):
    kind, message = BY_ITSELF[how]
    with pytest.raises(EzpzError, match=message):
        selected(config(kind), "for_loop", "a test")


def test_on_the_hosts_own_path_a_class_may_compute_as_it_likes():
    assert selected(config(BY_ITSELF["forward"][0]), "grouped_mm", "a test")


def initialized(experts: nn.Module) -> nn.Module:
    experts._param_init = {name: nn.init.zeros_ for name, _ in experts.named_parameters()}
    experts.init_states()
    return experts


@pytest.mark.parametrize("base", [GroupedExperts, GptOssGroupedExperts])
@pytest.mark.parametrize("how", WRAPPERS)
def test_weights_that_are_wrapped_after_the_selection_stop_the_run(base, how, capsys):
    """By a parent's constructor, or when the model is parallelized."""
    experts = selected(config(base), "for_loop", "a test").build()
    wrap_weights(initialized(copy.deepcopy(experts)), how)
    wrap_weights(experts, how)
    with pytest.raises(SystemExit, match="2"):
        initialized(experts)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f": {base.__name__} computes the experts' products itself" in said


@pytest.mark.parametrize("base", [GroupedExperts, GptOssGroupedExperts])
def test_a_converter_that_comes_after_the_selector_stops_the_run(base, capsys):
    """It makes a class of ours, and its seam would be ours alone, or never be called."""
    ours = selected(config(base), "for_loop", "a test")
    converted = changed(type(ours)._owner, _grouped_mm=lambda self, *, A, B_t, offs: None)
    with pytest.raises(SystemExit, match="2"):
        initialized(derive(ours, converted.Config).build())
    assert "quantized grouped GEMM" in capsys.readouterr().err


def test_on_the_hosts_own_path_wrapped_weights_do_what_they_do():
    experts = selected(config(GroupedExperts), "grouped_mm", "a test").build()
    wrap_weights(experts, "torch_function")
    initialized(experts)
