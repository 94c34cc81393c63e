"""What tokens choose together, and what is sent for it: against counts in plain Python.

Legend: T = tokens, K = top-k, E = experts, P = ranks.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import combinations
from math import gcd

import numpy as np
import pytest
import torch
from dialect import ON_0_2
from routing_cases import over_runs
from trainer_runs import AOT, EP_2, Runs, door_1, job_folder, telemetry

from ezpz_moe.routing import choices

E, P = 6, 3
IDS_TK = torch.tensor([[0, 1], [1, 5], [5, 1], [2, 6], [4, 5], [3, 1]])
"""Ids from 6 on are of no routed expert."""
MASK_T = torch.tensor([True, True, True, True, True, False])


def counting(x_TD: torch.Tensor, counters: dict[str, torch.Tensor], stride: int) -> torch.Tensor:
    """A router that would be a compiler's."""
    choices.count_pairs(counters["pairs"], counters["sampled"], IDS_TK, MASK_T, stride)
    choices.count_sent(counters["sent"], IDS_TK, MASK_T, E)
    return x_TD.square().sin()


def counters() -> dict[str, torch.Tensor]:
    return {
        "pairs": torch.zeros(E, E, dtype=torch.int32),
        "sampled": torch.zeros(1, dtype=torch.int64),
        "sent": torch.zeros(P, dtype=torch.int64),
    }


@pytest.fixture(autouse=True)
def nothing_counted():
    yield
    choices.count_this_step(False)


@over_runs
def test_pairs_are_those_of_a_counted_step_and_rows_those_of_all(run: Callable) -> None:
    """Recomputed or not, and a compiled model needs no other program when the step changes."""
    torch._dynamo.reset()
    of_run = counters()
    function = run(partial(counting, counters=of_run, stride=1))
    for step in range(3):
        choices.count_this_step(step == 1)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            function(torch.ones(3, requires_grad=True)).sum().backward()
    assert choices.top_pairs(of_run["pairs"], 9) == ((1, 5, 2), (0, 1, 1), (4, 5, 1))
    assert of_run["sampled"].tolist() == [5]
    # Rank 0 has experts 0 and 1: three tokens. Padding and what no rank computes are left out.
    assert of_run["sent"].tolist() == [3 * each for each in (3, 1, 3)]


def test_a_sample_has_every_so_many_tokens_and_autocast_does_not_round_it() -> None:
    choices.count_this_step(True)
    of_run = counters()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        counting(torch.ones(3), of_run, stride=2)
        ids_TK = torch.tensor([[0, 1]]).expand(1027, -1)  # which bfloat16 does not have
        choices.count_pairs(of_run["pairs"], of_run["sampled"], ids_TK, ids_TK[:, 0] == 0, 1)
    # Of tokens 0, 2 and 4, besides.
    assert choices.top_pairs(of_run["pairs"], 2) == ((0, 1, 1028), (1, 5, 1))
    assert of_run["sampled"].tolist() == [3 + 1027]


@pytest.mark.parametrize("tokens", [1, 4096, 4097, 65536, 3 * 2**20])
@pytest.mark.parametrize("length", [128, 4096, 1000])
def test_a_sample_is_of_all_positions_and_no_larger_than_it_may_be(tokens, length) -> None:
    stride = choices.stride_of(tokens, length)
    sampled = range(0, tokens, stride)
    assert len(sampled) <= choices.SAMPLED
    assert gcd(stride, length) == 1
    if tokens > choices.SAMPLED:
        assert len(sampled) > choices.SAMPLED // 3, "a sample that is far smaller than it may be"


# A run of two ranks -------------------------------------------------------------------------------

FLAVOR = """
inherits = "{like}"
routed = "{routed}"
compute_backend = "for_loop"
[telemetry]
every = 2
pairs = 5
dump = {{ every = 1, what = ["ids"] }}
"""
ONE_NODE, COMPILED, COMPOSED = "one_node", "compiled", "composed"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = job_folder(tmp_path_factory.mktemp("choices"))
    (folder / "with_zero.toml").write_text('inherits = "tiny"\n[router]\nnull_experts = 2\n')
    for routed, like in ((ONE_NODE, "tiny"), (COMPOSED, "with_zero")):
        (folder / f"{routed}.toml").write_text(FLAVOR.format(like=like, routed=routed))
    runs = Runs(folder)
    more = {
        ONE_NODE: (ONE_NODE, "full", ["--training.steps", "4"]),
        COMPILED: (ONE_NODE, "full", [*AOT, "--training.steps", "4"]),
        COMPOSED: (COMPOSED, "none", ["--training.steps", "2"]),
    }
    for run, (routed, checkpointing, flags) in more.items():
        scenario = door_1(folder, f"{routed}_sdpa", *EP_2, *flags, checkpointing=checkpointing)
        runs.add(run, scenario, ranks=2)
    return runs, folder


@pytest.mark.train
@pytest.mark.skipif(ON_0_2, reason="[telemetry] needs torchtitan 0.3 or later")
@pytest.mark.parametrize(
    "run",
    [
        ONE_NODE,
        # The test of a counted step compiles in the short check, without two ranks of a trainer.
        pytest.param(COMPILED, marks=pytest.mark.full),
        COMPOSED,
    ],
)
def test_a_record_counts_as_plain_python_does(runs, run):
    """Rows over all steps of a record, pairs in its last one; recomputed and compiled."""
    of, folder = runs
    assert of[run]
    records = telemetry(folder, run)
    assert len(records) >= 2
    for record in records:
        steps = range(record["step"] - record["steps"] + 1, record["step"] + 1)
        for number, layer in enumerate(record["layers"]):
            ids = {
                (step, rank): dumped(folder / run, step, rank, number)
                for step in steps
                for rank in range(2)
            }
            rows = Counter(
                (rank, to)
                for (_, rank), tokens in ids.items()
                for token in tokens
                for to in ranks_of(token, once=run != COMPOSED)
            )
            assert layer["rows_dispatched"] == rows.total()
            assert layer["rows_off_rank"] == rows[0, 1] + rows[1, 0]
            assert layer["rows_off_node"] is None, "both ranks are on one node"
            assert layer["figures"]["off_rank"] == layer["rows_off_rank"] / rows.total()
            last = [token for rank in range(2) for token in ids[record["step"], rank]]
            together = Counter(pair for token in last for pair in combinations(token, 2))
            top = sorted(together.items(), key=lambda each: (-each[1], each[0]))[:5]
            assert layer["pairs"] == [[*pair, times] for pair, times in top]
            assert layer["sampled_tokens"] == len(last)


def dumped(run, step: int, rank: int, layer: int) -> list[list[int]]:
    """The routed experts of each token, in their order."""
    ids_TK = np.load(run / "routing" / f"step_{step}_rank_{rank}.npz")["ids"][layer]
    return [sorted(each for each in token if each < 8) for token in ids_TK.tolist()]


def ranks_of(token: list[int], *, once: bool) -> list[int]:
    """Where a token is sent, of eight experts on two ranks."""
    ranks = [expert // 4 for expert in token]
    return sorted(set(ranks)) if once else ranks
