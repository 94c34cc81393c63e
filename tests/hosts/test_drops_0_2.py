"""torchtitan 0.2 has no ``[telemetry]``, and yet no run of it loses tokens unreported."""

import re
from functools import partial
from types import SimpleNamespace

import dialect
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from trainer_runs import LOG, job_folder, train

from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02

check_host()

if type(host()) is not Titan02:
    pytest.skip(
        f"the installed host is {host().name}; make test-hosts runs these",
        allow_module_level=True,
    )

from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.config import JobConfig  # noqa: E402

from ezpz_moe.hosts.titan_0_2 import metrics  # noqa: E402
from ezpz_moe.hosts.titan_0_2.experts import EzpzGroupedExperts  # noqa: E402

COUNTS, ROWS = torch.tensor([5, 0, 11, 16]), 36  # four tail rows
AT_MEAN = "batched_mm_capacity(capacity_factor=1.0)"
BELOW_MEAN = "batched_mm_capacity(capacity_factor=0.75)"
STEPS = 3  # of the tests' job
GIVEN_COMPUTED_DROPPED = [32, 4 * 9, 2 + 7]


def experts(backend: str) -> EzpzGroupedExperts:
    module = EzpzGroupedExperts(32, 48, 4, use_grouped_mm=False, compute_backend=backend)
    with torch.no_grad():
        module.init_weights(0.02)
    return module.bfloat16()


@pytest.mark.parametrize("recomputed", [False, True])
def test_each_forward_in_training_counts_once(recomputed):
    module = experts(AT_MEAN)
    forward = partial(checkpoint, module, use_reentrant=False) if recomputed else module
    x_RD = torch.randn(ROWS, 32, dtype=torch.bfloat16, requires_grad=True)
    for times in (1, 2):
        forward(x_RD, COUNTS).sum().backward()
        assert module.rows_3.tolist() == [times * each for each in GIVEN_COMPUTED_DROPPED]
    module.eval()
    forward(x_RD, COUNTS)
    assert module.rows_3.tolist() == [2 * each for each in GIVEN_COMPUTED_DROPPED]


def test_a_backend_that_drops_nothing_is_not_counted():
    module = experts("batched_mm_padded")
    module(torch.randn(ROWS, 32, dtype=torch.bfloat16), COUNTS)
    assert module.rows_3 is None
    model_args = SimpleNamespace(compute_backend="batched_mm_padded")
    built = metrics.build(JobConfig(), parallel_dims=None, model_args=model_args)
    assert type(built) is MetricsProcessor


@pytest.mark.train
@pytest.mark.ranks
def test_a_run_says_what_it_drops(tmp_path):
    """Room for three quarters of the mean drops a quarter where routing is even, and else more.

    Every rank says the same: what all have dropped, in all layers, also those of other stages.
    """
    folder = job_folder(tmp_path)
    (folder / "drops.toml").write_text(f'inherits = "tiny"\ncompute_backend = "{BELOW_MEAN}"\n')
    text = (folder / "job.toml").read_text().replace('"tiny_sdpa"', '"drops_sdpa"')
    (folder / "job.toml").write_text(text.replace('mode = "none"', 'mode = "full"'))
    runs = {
        "even": ["--debug.moe-force-load-balance"],
        "sharded": [],
        "pipeline": ["--parallelism.pipeline-parallel-degree", "2"],
    }
    flag = "--metrics.enable-tensorboard"
    jobs = {name: dialect.job(folder / "job.toml", flag, *more) for name, more in runs.items()}
    train(jobs, folder, ranks=2)
    logged = {name: _scalars(folder / name) for name in runs}
    assert logged["even"]["moe/drop_rate"] == [pytest.approx(0.25)] * STEPS
    assert logged["even"]["moe/drop_rate_worst"] == [pytest.approx(0.25)] * STEPS
    assert logged["even"]["moe/padding_waste"] == [pytest.approx(0)] * STEPS
    log = (folder / LOG).read_text()
    assert f"{BELOW_MEAN} drops tokens beyond its capacity" in log
    said = re.findall(r"[\d.]+% of the experts' tokens dropped since the last log, .*layer", log)
    assert len(said) == len(runs) * STEPS * 2
    for number, name in enumerate(runs):
        if name == "even":
            continue
        rates, worst_rates = logged[name]["moe/drop_rate"], logged[name]["moe/drop_rate_worst"]
        assert max(rates) > 0.25
        assert rates != worst_rates  # both layers may drop as much as each other in some steps
        by_ranks = said[number * STEPS * 2 :]
        for rate, worst in zip(rates, worst_rates, strict=True):
            assert 0.25 <= rate <= worst
            line = f"{rate:.1%} of the experts' tokens dropped since the last log, {worst:.1%}"
            assert by_ranks[:2] == [f"{line} in the worst layer"] * 2, name
            by_ranks = by_ranks[2:]


def _scalars(folder) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.*")
    read = EventAccumulator(str(events))
    read.Reload()
    return {tag: [each.value for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
