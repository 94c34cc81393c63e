"""torchao's own float8 and MXFP8 beside the selector, as torchtitan 0.3 puts them into a model.

``make test-all`` runs these in an environment of their own: the package has nothing of torchao's.
"""

from unittest import mock

import pytest
import torch

pytest.importorskip("torchao", reason="torchao is not installed; `nox -s torchao` runs these")

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.components.quantization import (  # noqa: E402
    Float8GroupedExpertsConverter,
    Float8Linear,
    Float8LinearConverter,
    MXFP8GroupedExpertsConverter,
    MXFP8LinearConverter,
)
from torchtitan.models import deepseek_v3, gpt_oss  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts, MoE  # noqa: E402

from ezpz_moe.compute import get_backend  # noqa: E402
from ezpz_moe.hosts.titan.attention import use_sdpa  # noqa: E402
from ezpz_moe.hosts.titan.selector import select_backend  # noqa: E402

MODELS = {"deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss}
CAPABLE = "torchtitan.components.quantization.{}.has_cuda_capability"


@pytest.fixture(autouse=True)
def _a_gpu_that_multiplies_eight_bits(monkeypatch):
    """The converters ask for it; models are made without."""
    for module in ("float8", "mx"):
        monkeypatch.setattr(CAPABLE.format(module), lambda *_: True)


def converted(model: str, converter: type, **settings):
    registry = MODELS[model].model_registry
    return registry("debugmodel", converters=[converter.Config(**settings)]).model


@pytest.mark.parametrize("backend", ["for_loop", "grouped_mm"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("converter", [Float8GroupedExpertsConverter, MXFP8GroupedExpertsConverter])
def test_quantized_experts_are_refused(converter, model, backend):
    config = converted(model, converter)
    with pytest.raises(EzpzError, match="computes the experts' products itself") as error:
        select_backend(config, backend, "a test")
    said = str(error.value)
    wrapped = ": its weights are Float8TrainingWeightWrapperTensor" in said
    assert wrapped == (converter is Float8GroupedExpertsConverter)
    assert "(quantized grouped GEMM" in said
    assert said.endswith("converter of the experts, or do not select a backend.")


@pytest.mark.parametrize("model", MODELS)
def test_experts_that_are_quantized_after_the_selection_stop_the_run(model, capsys):
    from torchao.prototype.moe_training.config import Float8TrainingOpConfig
    from torchao.quantization.quant_api import quantize_

    config = MODELS[model].model_registry("debugmodel").model
    select_backend(config, "for_loop", "a test")
    experts = next(config.traverse(GroupedExperts.Config))[1].build()
    quantize_(experts, Float8TrainingOpConfig(), filter_fn=lambda *_: True)
    with pytest.raises(SystemExit, match="2"):
        experts.init_states()
    assert "its weights are Float8TrainingWeightWrapperTensor" in capsys.readouterr().err


@pytest.mark.parametrize("converter", [Float8LinearConverter, MXFP8LinearConverter])
@pytest.mark.parametrize("model", MODELS)
def test_quantized_linears_leave_the_experts_to_the_backend(model, converter):
    config = converted(model, converter)
    assert select_backend(config, "for_loop", "a test") == len(list(config.traverse(MoE.Config)))
    with torch.device("meta"):
        assert config.build()


def test_a_model_with_float8_linears_trains_with_a_backend():
    """Emulated, which is float8's own way to run without such a GPU."""
    leave_out = ["lm_head", "router.gate"]
    config = converted("deepseek_v3", Float8LinearConverter, emulate=True, filter_fqns=leave_out)
    use_sdpa(config)
    layers = select_backend(config, "for_loop", "a test")
    torch.manual_seed(0)
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    backend = get_backend("for_loop")
    ours = mock.Mock(wraps=backend.routed)
    with mock.patch.object(type(backend), "routed", ours):
        tokens = torch.randint(2048, (1, 16))
        model(tokens, positions=torch.arange(16)[None]).float().square().mean().backward()
    assert ours.call_count == layers
    linears = [each for each in model.modules() if isinstance(each, Float8Linear)]
    assert len(linears) > 2 * layers
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
