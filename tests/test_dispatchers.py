"""Token dispatchers for expert parallelism: what each asks for is said before a model is built."""

import sys

import pytest
from absent_packages import stand_in
from config_cases import config, conflict

from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.titan.v2026_08 import Titan2026_08

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # noqa: E402
from torchtitan.tools import utils  # noqa: E402

from ezpz_moe.hosts.titan.dispatchers import OF_DEEP_EP, dispatcher_machine_problems  # noqa: E402

SINCE_2026_08 = isinstance(host(), Titan2026_08)
COMM = "parallelism__expert_parallel_comm_backend"
EP_2 = {"parallelism__expert_parallel_degree": 2}


@pytest.mark.parametrize("name", ["deepep", "hybridep", "minimal_async_ep"])
def test_a_token_dispatcher_without_expert_parallelism(name):
    """The host says so when it has begun to build."""
    message = conflict(**{COMM: name})
    assert f'expert_parallel_comm_backend = "{name}" sends tokens between ranks, but' in message
    assert 'expert_parallel_degree = 1. Leave it out, or set it to "standard".' in message
    assert config(**{COMM: "standard"}), "runs at degree 1 too"
    full = {"activation_checkpoint__mode": "full"}
    assert config(**{COMM: name}, **EP_2, **full), "with whatever it asks for"


def test_a_token_dispatcher_that_recomputes_everything():
    message = conflict(**{COMM: "minimal_async_ep"}, **EP_2)
    assert 'needs all activations to be recomputed. Set [activation_checkpoint] mode = "full".' in (
        message
    )
    assert config(**{COMM: "deepep"}, **EP_2)


def test_what_only_the_host_knows_of_a_token_dispatcher():
    values = {"parallelism__spmd_backend": "full_dtensor", "activation_checkpoint__mode": "full"}
    if SINCE_2026_08:
        pytest.skip("this host has no full_dtensor")
    message = conflict(**{COMM: "minimal_async_ep"}, **EP_2, **values)
    assert "torchtitan refuses it: MinimalAsyncEP does not support full_dtensor SPMD." in message
    ours = config(**{COMM: "deepep"}, **EP_2).model_spec.model
    (limit,) = {
        node.num_max_tokens_per_rank for _, node, _, _ in ours.traverse(LocalTokenDispatcher.Config)
    }
    assert limit is None, "the check has not filled in the run's own config"


@pytest.mark.parametrize("name", ["deepep", "hybridep", "minimal_async_ep"])
def test_a_token_dispatcher_that_this_machine_cannot_run(monkeypatch, in_training, name):
    monkeypatch.setattr(utils, "device_type", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    values = {COMM: name, **EP_2, "activation_checkpoint__mode": "full"}
    assert f'"{name}" has kernels for CUDA alone; this is cpu.' in conflict(**values)


@pytest.mark.parametrize(("name", "needed"), list(OF_DEEP_EP.items()))
def test_a_token_dispatcher_whose_package_is_absent(monkeypatch, name, needed):
    monkeypatch.setattr(utils, "device_type", "cuda")

    def problems(name: str) -> list[str]:
        values = {COMM: name, "activation_checkpoint__mode": "full"}
        return list(dispatcher_machine_problems(config("debugmodel", **values, **EP_2)))

    (message,) = problems(name)
    assert f'"{name}" needs the package deep_ep with its {needed}, which cannot' in message
    with stand_in("deep_ep"):
        assert problems(name) == []
        sys.modules["deep_ep"].lacks.add(needed)  # as a version with the other of the two
        assert problems(name) == [message]
    assert problems("minimal_async_ep") == [], "it is the host's own"
