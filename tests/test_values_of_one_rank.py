"""What a rank is given of the values that one rank would draw; no host, one process.

``tests/hosts/test_initial_values.py`` has the same with the trainer and real ranks.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.initial_values import (
    WholeModel,
    copy_part,
    has_several_ranks,
    initialize_as_one_rank,
    whole_model,
)


class Model(nn.Module):
    """Initialisers of every kind: in place, through temporaries, and from one another."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.Parameter(torch.empty(6, 5))
        self.rejected = nn.Parameter(torch.empty(4, 8, 3))
        self.orthogonal = nn.Parameter(torch.empty(5, 5))
        self.copied = nn.Parameter(torch.empty(7, 2, dtype=torch.bfloat16))
        self.ones = nn.Parameter(torch.empty(3))
        self.register_buffer("table", torch.empty(4))

    def init_weights(self) -> None:
        nn.init.normal_(self.normal)
        nn.init.trunc_normal_(self.rejected, std=1.0, a=-0.8, b=0.8)
        nn.init.orthogonal_(self.orthogonal)
        with torch.no_grad():
            self.copied.copy_(torch.randn(7, 2).abs())
        nn.init.ones_(self.ones)
        self.table = torch.arange(4.0)


def initialize(model, buffer_device) -> None:
    model.init_weights()


def on_meta(model_class=Model) -> nn.Module:
    with torch.device("meta"):
        return model_class()


def of_one_rank(model_class=Model, seed: int = 0) -> dict[str, torch.Tensor]:
    model = on_meta(model_class).to_empty(device="cpu")
    torch.manual_seed(seed)
    initialize(model, None)
    return model.state_dict()


def part_and_whole(model_class=Model, seed: int = 0) -> tuple[nn.Module, WholeModel]:
    """A rank's model before it has values, on a rank whose generator had ``seed``."""
    model = on_meta(model_class)
    whole = WholeModel(model)
    torch.manual_seed(seed)
    whole._generator = torch.get_rng_state()  # what is agreed on with other ranks
    return model.to_empty(device="cpu"), whole


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_the_values_are_those_of_one_rank_with_the_agreed_seed() -> None:
    model, whole = part_and_whole(seed=7)
    torch.manual_seed(8)  # another stage of a pipeline
    initialize_as_one_rank(model, whole, initialize, None)
    assert_equal(model.state_dict(), of_one_rank(seed=7))


def test_a_stage_has_the_values_that_it_has_in_the_whole_model() -> None:
    model, whole = part_and_whole()
    stage_names = ("orthogonal", "ones")
    for name, _ in list(model.named_parameters()):
        if name not in stage_names:
            delattr(model, name)
    whole.give_values_to(model, initialize)
    expected = of_one_rank()
    assert {name for name, _ in model.named_parameters()} == set(stage_names)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])


def test_later_stages_of_a_rank_get_the_values_of_the_same_start() -> None:
    first, whole = part_and_whole(seed=7)
    second = on_meta().to_empty(device="cpu")
    initialize_as_one_rank(first, whole, initialize, None)
    initialize_as_one_rank(second, whole, initialize, None)
    assert_equal(first.state_dict(), of_one_rank(seed=7))
    assert_equal(second.state_dict(), of_one_rank(seed=7))


def test_afterwards_the_generator_is_as_the_host_leaves_it() -> None:
    model, whole = part_and_whole(seed=7)
    torch.manual_seed(8)
    initialize_as_one_rank(model, whole, initialize, None)
    state = torch.get_rng_state()
    of_one_rank(seed=8)
    assert torch.equal(state, torch.get_rng_state())


def test_names_do_not_change_where_modules_are_wrapped() -> None:
    model, whole = part_and_whole()
    wrapped = nn.ModuleDict({"_checkpoint_wrapped_module": model})
    whole.give_values_to(wrapped, lambda part, device: part.init_weights())
    expected = of_one_rank()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])


class Tied(nn.Module):
    """Like the host's qwen3 of 0.2: the tied matrix is drawn twice, with others in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(4, 3))
        self.middle = nn.Parameter(torch.empty(4, 3))
        self.output = self.embedding

    def init_weights(self) -> None:
        self.output = self.embedding
        nn.init.normal_(self.embedding)
        nn.init.uniform_(self.middle)
        with torch.no_grad():
            self.output.add_(torch.randn(4, 3))


def test_a_parameter_that_is_drawn_in_two_goes() -> None:
    model, whole = part_and_whole(Tied)
    initialize_as_one_rank(model, whole, initialize, None)
    assert_equal(model.state_dict(), of_one_rank(Tied))


def test_of_the_whole_model_one_parameter_has_memory() -> None:
    seen = []

    class Watched(Model):
        def init_weights(self) -> None:
            super().init_weights()
            seen.append([p.untyped_storage().nbytes() for p in self.parameters()])

    model, whole = part_and_whole(Watched)
    whole.give_values_to(model, initialize)
    *before, last = seen[0]
    assert before == [0] * len(before)
    assert last == model.ones.nbytes
    assert {each.device.type for each in whole._model.state_dict().values()} == {"meta"}


def test_an_initialiser_with_a_generator_of_its_own_is_refused_by_name() -> None:
    generator = torch.Generator()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.empty(2))
            self.second = nn.Parameter(torch.empty(2))

        def init_weights(self) -> None:
            nn.init.normal_(self.first)
            nn.init.normal_(self.second, generator=generator)

    model, whole = part_and_whole(Own)
    with pytest.raises(EzpzError, match=r"initialiser of second .* generator of its own"):
        initialize_as_one_rank(model, whole, initialize, None)


def test_a_parameter_that_the_built_model_did_not_have_is_refused_by_name() -> None:
    model, whole = part_and_whole()
    model.adapter = nn.Parameter(torch.zeros(2))
    with pytest.raises(EzpzError, match="parameters adapter were added after the model was built"):
        whole.give_values_to(model, initialize)


def test_a_part_that_nothing_is_known_of_is_refused_by_name() -> None:
    model, whole = part_and_whole()
    model.normal = nn.Parameter(torch.empty(3, 5))
    with pytest.raises(EzpzError, match=r"parameter normal \(6, 5\) has the shape \(3, 5\)"):
        whole.give_values_to(model, initialize)


@pytest.fixture
def as_rank():
    """``as_rank(rank, ranks)``: this process is that rank, and the others are pretended."""

    def become(rank: int, ranks: int) -> None:
        leave()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)

    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    yield become
    leave()


def test_pretended_ranks_are_no_ranks(as_rank) -> None:
    assert whole_model(Model()) is None
    as_rank(0, 4)
    assert not has_several_ranks()
    assert whole_model(Model()) is None


RANKS = [[0, 1], [2, 3]]
PLACEMENTS = {
    "replicated": (Replicate(), Replicate()),
    "hybrid": (Replicate(), Shard(0)),
    "experts, then rows": (Shard(1), Shard(0)),
    "both on one dimension": (Shard(0), Shard(0)),
    "tensor parallel, then fully sharded": (_StridedShard(0, split_factor=2), Shard(0)),
    "the last dimension": (Shard(2), Replicate()),
}
# Shared out evenly, and with ranks that hold less than others or nothing.
SHAPES = ((8, 4, 2), (3, 5, 1))


@pytest.mark.parametrize("mesh_device", ["cpu", "cuda"])  # cuda: weights offloaded to the CPU
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("placements", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_rank_is_given_its_part(placements, shape, mesh_device, as_rank) -> None:
    whole = torch.randn(shape)
    for rank in range(4):
        as_rank(rank, 4)
        expected = distribute_tensor(
            whole, DeviceMesh("cpu", RANKS), placements, src_data_rank=None
        ).to_local()
        spec = DTensorSpec(
            DeviceMesh(mesh_device, RANKS),
            placements,
            tensor_meta=TensorMeta(whole.shape, whole.stride(), whole.dtype),
        )
        local = torch.full_like(expected, torch.nan)
        copy_part("weight", whole, DTensor(local, spec, requires_grad=False))
        assert torch.equal(local, expected)
