"""Fixtures of the tests that hold with every host."""

import pytest
import torch

from ezpz_moe.flavors import load_flavor
from ezpz_moe.hosts import binding


@pytest.fixture
def model_with(tmp_path):
    """``model_with(tables)``: a small model with these tables in its flavor, in float32."""

    def build(tables: str, base: str = 'inherits = "tiny"'):
        flavor = "mine"
        (tmp_path / "tiny.toml").write_text('inherits = "debugmodel"\nn_layers = 2\n')
        (tmp_path / f"{flavor}.toml").write_text(f'{base}\nattention = "sdpa"\n{tables}\n')
        spec = binding("models").model_spec(load_flavor(flavor, near=tmp_path))
        torch.manual_seed(0)
        built = spec.model.build()
        built.init_weights(buffer_device=torch.device("cpu"))
        return built.train()

    return build
