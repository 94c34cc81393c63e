"""What routers count becomes the records of a run: of each step, and of all ranks. No trainer runs.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from router_cases import B, L, routed, router_of, small_model, sums_of, tokens
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ezpz_moe.config.telemetry_schema import Dump, Telemetry
from ezpz_moe.hosts.titan.groups import Groups
from ezpz_moe.hosts.titan.metrics import RouterMetrics
from ezpz_moe.telemetry.json_lines import read
from ezpz_moe.telemetry.record import StepRecord

BALANCE = "[balance]\naux_loss = 0.5\nmse_loss = 3.0\nz_loss = 0.25\n"
ONE_RANK = SimpleNamespace(
    pp_enabled=False,
    ep_enabled=False,
    non_data_parallel_size=1,
    get_optional_mesh=lambda name: None,
)


@pytest.fixture
def metrics(tmp_path: Path):
    """Makes the metrics processor of a model, as the trainer would on one rank."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)

    def make(model: torch.nn.Module, every: int, dump: Dump | None = None) -> RouterMetrics:
        telemetry = Telemetry(every=every, images=False, dump=dump)
        config = RouterMetrics.Config(telemetry=telemetry)
        made = RouterMetrics(config, parallel_dims=ONE_RANK, dump_folder=str(tmp_path))
        made.model_parts, made.num_flops_per_token = [model], 1
        return made

    yield make
    torch.distributed.destroy_process_group()


def train(metrics: RouterMetrics, *, steps: int) -> list[StepRecord]:
    """Steps of two microbatches, all of the same tokens, in the trainer's order of calls."""
    router = router_of(metrics.model_parts[0])
    x_BLD = tokens(router.gate.in_features)
    for step in range(1, steps + 1):
        metrics.should_log(step)
        for _ in range(2):
            routed(router, x_BLD)
        metrics.data_loading_times.append(0.0)
        metrics.log(step, 1.0, 1.0, 1.0)
    return read(metrics._path)


def test_a_record_has_the_losses_of_one_step_and_the_assignments_of_all(metrics, tmp_path) -> None:
    """Every step is alike here, so that each record has the same losses."""
    records = train(metrics(small_model(tmp_path, BALANCE + "[telemetry]"), every=3), steps=6)
    assert [(each.step, each.steps) for each in records] == [(1, 1), (3, 2), (6, 3)]
    (first,) = records[0].layers
    assert first.losses.keys() == {"aux_loss", "mse_loss", "z_loss"}
    assert all(loss > 0 for loss in first.losses.values())
    coefficients = {"aux_loss": 0.5, "mse_loss": 3.0, "z_loss": 0.25}
    for record in records:
        (layer,) = record.layers
        assert layer.tokens == record.steps * 2 * B * L
        assert layer.counts_E == tuple(record.steps * count for count in first.counts_E)
        # A sum of 2 x steps equal float32 numbers: a rounding each.
        assert layer.losses == pytest.approx(first.losses, rel=6 * 2.0**-24)
        scaled = {name: coefficients[name] * loss for name, loss in layer.losses.items()}
        assert layer.scaled_losses == pytest.approx(scaled, rel=1e-12)
        assert layer.margin == pytest.approx(first.margin, rel=1e-5)


def test_a_record_has_the_mean_probability_of_each_expert(metrics, tmp_path) -> None:
    """Of sigmoid scores too, and without what zero-computation experts have."""
    tables = "[router]\nnull_experts = 3\n[telemetry]"
    made = metrics(small_model(tmp_path, tables), every=3)
    made.model_parts[0].layers["1"].moe.router.score_func = "sigmoid"
    last = train(made, steps=3)[-1].layers[0]
    router = router_of(made.model_parts[0])
    scores_TE = routed(router, tokens(router.gate.in_features))[2].double()
    p_E = (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)[:8]
    assert last.probabilities_E == pytest.approx(p_E.tolist(), rel=6e-4)  # four digits
    assert sum(last.probabilities_E) < 0.9


def test_a_step_is_routed_at_its_own_temperature(metrics, tmp_path) -> None:
    """Also the first: the trainer asks whether to log before it trains."""
    tables = "[router]\ntemperature = {start = 4.0, end = 1.0, steps = 4}\n[telemetry]"
    made = metrics(small_model(tmp_path, tables), every=1)
    router = router_of(made.model_parts[0])
    seen = []
    for step in range(1, 6):
        made.should_log(step)
        seen.append(router.gate.temperature.item())
    assert seen == [4.0, 3.0, 2.0, 1.0, 1.0]


def validate(metrics: RouterMetrics, x_BLD: Tensor, *, microbatches: int) -> dict[str, float]:
    """What the loggers get of a validation of these tokens, again and again."""
    router = router_of(metrics.model_parts[0])
    metrics.model_parts[0].eval()
    with torch.no_grad():
        for _ in range(microbatches):
            routed(router, x_BLD)
    metrics.model_parts[0].train()
    logged: dict[str, float] = {}
    metrics.logger.log = lambda values, step: logged.update(values)
    metrics.log_validation(2.5, 3)
    del metrics.logger.log
    return {name: value for name, value in logged.items() if name.startswith("moe_val/")}


def watched(model: torch.nn.Module) -> torch.nn.Module:
    """The model as the trainer has it: its routers report, and 12 sequences are a step."""
    for router in (layer.moe.router for layer in model.layers.values() if layer.moe_enabled):
        router.gate.is_counted = True
        router.groups = {
            scope: Groups(scope == "sequence", weight=1 / 12) for scope in router.groups
        }
    return model


def test_validation_has_its_own_figures_and_leaves_training_alone(metrics, tmp_path) -> None:
    """Its losses are means over its own sequences, of which it has more than a training step."""
    made = metrics(watched(small_model(tmp_path, BALANCE + "[telemetry]")), every=3)
    router = router_of(made.model_parts[0])
    (trained,) = train(made, steps=1)[0].layers
    x_BLD = tokens(router.gate.in_features)
    of_same = validate(made, x_BLD, microbatches=5)
    # Of the same tokens and the same weights: means of float32 numbers, each a rounding.
    for name, loss in trained.losses.items():
        assert of_same[f"moe_val/{name}"] == pytest.approx(loss, rel=20 * 2.0**-24)
    assert of_same["moe_val/margin"] == pytest.approx(trained.margin, rel=20 * 2.0**-24)
    assert "moe_val/drop_rate" not in of_same
    other_BLD = tokens(router.gate.in_features, seed=2)
    counts_E = torch.bincount(routed(router.eval(), other_BLD)[1].flatten(), minlength=8).double()
    router.train()
    router.val_counts_E.zero_(), router.val_sums_S.zero_()  # of the line before
    figures = validate(made, other_BLD, microbatches=2)
    assert figures["moe_val/cv"] == pytest.approx(counts_E.std(correction=0) / counts_E.mean())
    assert figures["moe_val/tokens_per_expert"] == 2 * counts_E.mean()
    made.should_log(2), made.should_log(3)
    routed(router, x_BLD)
    made.data_loading_times.append(0.0)
    made.log(3, 1.0, 1.0, 1.0)
    (layer,) = read(made._path)[-1].layers
    assert layer.tokens == B * L
    assert 2 * sum(layer.counts_E) == sum(trained.counts_E)


def test_validation_that_is_not_finite_stops_the_run(metrics, tmp_path) -> None:
    made = metrics(watched(small_model(tmp_path, "[telemetry]")), every=1)
    x_BLD = tokens(router_of(made.model_parts[0]).gate.in_features)
    x_BLD[0, 0] = torch.inf
    made.should_log(3)
    message = (
        r"router's logits in layer 1 are not finite for 2 tokens of the validation after step 3"
    )
    with pytest.raises(RuntimeError, match=message):
        validate(made, x_BLD, microbatches=2)


def dumping(metrics, tmp_path: Path) -> RouterMetrics:
    """As a run that dumps every second step begins, in a folder with dumps of three steps."""
    folder = tmp_path / "routing"
    folder.mkdir()
    for step in (1, 2, 3):
        (folder / f"step_{step}_rank_0.npz").write_text("of before")
    made = metrics(small_model(tmp_path, "[telemetry]"), every=1, dump=Dump(every=2, what=("ids",)))
    router = router_of(made.model_parts[0])
    router.is_kept, router.layer, router.tokens_of_step = True, 1, 2 * B * L
    router._init_self_buffers()
    return made


def test_a_resumed_run_dumps_its_own_steps_and_sets_those_of_before_aside(
    metrics, tmp_path
) -> None:
    made = dumping(metrics, tmp_path)
    router = router_of(made.model_parts[0])
    inputs = [tokens(router.gate.in_features, seed=seed) for seed in (1, 2)]
    for step in (2, 3, 4):
        made.should_log(step)
        expected = [routed(router, x_BLD)[1] for x_BLD in inputs]
        made.data_loading_times.append(0.0)
        made.log(step, 1.0, 1.0, 1.0)
        validate(made, inputs[0], microbatches=1)
    folder = tmp_path / "routing"
    names = ("abandoned", "step_1_rank_0.npz", "step_2_rank_0.npz", "step_4_rank_0.npz")
    assert sorted(each.name for each in folder.iterdir()) == sorted(names)
    assert (folder / "step_1_rank_0.npz").read_text() == "of before"
    aside = {"step_2_rank_0.1.npz", "step_3_rank_0.1.npz"}
    assert {each.name for each in (folder / "abandoned").iterdir()} == aside
    for step in (2, 4):
        dump = np.load(folder / f"step_{step}_rank_0.npz")
        assert dump["layers"].tolist() == [1]
        assert dump["ids"].tolist() == [torch.cat(expected).tolist()]
        assert "probabilities" not in dump


def test_dumps_of_before_that_cannot_be_set_aside_are_not_overwritten(
    metrics, tmp_path, caplog
) -> None:
    made = dumping(metrics, tmp_path)
    (tmp_path / "routing" / "abandoned").touch()
    train(made, steps=2)
    texts = {each.read_text() for each in (tmp_path / "routing").glob("*.npz")}
    assert texts == {"of before"}
    (said,) = (each.message for each in caplog.records if "cannot be moved" in each.message)
    assert "the dumps of step 1 and later, of an attempt that was abandoned, cannot be" in said


class _TwoRanks(Groups):
    """A group whose other rank has the same tokens as this one."""

    ranks = 2

    def share(self, addend: Tensor) -> Tensor:
        return addend + addend.detach()


def test_a_loss_of_a_group_on_two_ranks_is_counted_once(tmp_path) -> None:
    """The ranks' sums add up to those of one rank that has all tokens, the losses among them."""
    x_BLD = tokens(256)
    sums = []
    for groups, mine in ((_TwoRanks(False), x_BLD), (Groups(False), torch.cat([x_BLD, x_BLD]))):
        router = router_of(small_model(tmp_path, BALANCE + "[telemetry]"), groups=groups)
        routed(router, mine)
        sums.append(sums_of(router))
    of_each, of_all = sums
    assert of_all["aux_loss_sequence"] > 0
    # Means over 2 B L tokens in another order.
    doubled = {name: 2 * value for name, value in of_each.items()}
    assert doubled == pytest.approx(of_all, rel=2 * B * L * 2.0**-24, abs=1e-12)
