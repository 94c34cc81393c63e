"""Fixtures of the tests that hold with every host."""

import functools

import pytest


@pytest.fixture
def model_with(tmp_path):
    """``model_with(tables)``: a small model with these tables in its flavor, in float32."""
    from router_cases import small_model  # here: it skips on torchtitan 0.2

    return functools.partial(small_model, tmp_path)
