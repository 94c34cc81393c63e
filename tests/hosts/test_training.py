"""What the unmodified trainer computes with the backends, in real runs on this machine.

- the host's own experts and ``compute_backend = "grouped_mm"``: the same bits, for five steps;
- the other backends: the same within what one more rounding to bfloat16 does to the host itself;
- a checkpoint of one backend goes on under another;
- activation checkpointing, torch.compile and gradient accumulation change nothing else;
- the host's own deepseek_v3, qwen3 and gpt_oss take the backends, as far as they train on a CPU.
"""

from pathlib import Path

import pytest
from dialect import (
    DUMP_FOLDER,
    EXPERTS,
    MODELS,
    ON_0_2,
    SINCE_2026_09,
    batch,
    by_flavor,
    stock,
    with_backend,
    write_text,
)
from trainer_runs import (
    BACKENDS,
    COMPUTED_BY,
    OneRank,
    assert_same_bits,
    assert_within_twice,
    compare_gradients,
    composed,
    door_1,
    job_folder,
)

ALL = ("grouped_mm", *BACKENDS)
ON_ANY_MODEL = BACKENDS if ON_0_2 else (*BACKENDS, "auto")
STEPS = 5
"""Of the host's own model: enough for moments of several steps to have updated every parameter."""
NOISE = "host, one more rounding"
DRAWS = 4
"""Of that rounding. One alone can be close to zero, and says nothing of what is usual then."""
AOT = ("--compile.enable", "--compile.backend", "aot_eager")
SHORT = {
    "deepseek_v3": ON_ANY_MODEL,
    "qwen3": ("batched_mm_padded",),
    "gpt_oss": ("for_loop", "grouped_mm_fused"),
}
"""Each model with some of the backends: the rest is the full check's."""
TRACED_IN_SHORT = {"for_loop", "capacity"}
CHECKPOINTED_IN_SHORT = {"full": {"for_loop", "capacity", "choice"}}
CHECKPOINTED_IN_SHORT["selective"] = COMPUTED_BY.keys() - CHECKPOINTED_IN_SHORT["full"]

pytestmark = pytest.mark.train


def case(*values: str, short: bool):
    return pytest.param(*values, marks=() if short else pytest.mark.full)


ON_MODELS = [case(m, b, short=b in SHORT[m]) for m in MODELS for b in ON_ANY_MODEL]
NO_NODES = ON_0_2 or SINCE_2026_09  # all routed layers are composed there
COMPOSED = MODELS if NO_NODES else ("gpt_oss",)
"""Models whose routed layers are never one node."""
LIKE_FOR_LOOP = ALL if NO_NODES else BACKENDS
"""Those whose forward has its bits."""
COMPOSED_ON_MODELS = [
    case(m, b, short=b in SHORT[m] and (m in COMPOSED or m == "qwen3"))
    for m in MODELS
    for b in ON_ANY_MODEL
]


def tiny(folder: Path, backend: str, *flags: str, checkpointing: str = "none") -> list[str]:
    return door_1(folder, f"tiny_sdpa_{backend}", *flags, checkpointing=checkpointing)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> OneRank:
    """Every single-process run of this file, by name."""
    folder = job_folder(tmp_path_factory.mktemp("single"))
    write_text(folder)
    runs = OneRank(folder)
    several_steps = stock("deepseek_v3", folder, steps=STEPS)
    runs.add("deepseek_v3 host", several_steps)
    runs.add("flavor", by_flavor(folder, steps=STEPS))
    for draw in range(DRAWS):
        runs.add(f"deepseek_v3 {NOISE} {draw}", [*several_steps, f"--rounding-noise={draw}"])
    for backend in ("grouped_mm", *ON_ANY_MODEL):
        run = with_backend("deepseek_v3", backend, folder, steps=STEPS)
        runs.add(f"deepseek_v3 {backend}", run)
    for model in sorted(MODELS.keys() - {"deepseek_v3"}):
        one_step = stock(model, folder, steps=1)
        runs.add(f"{model} host", one_step)
        runs.add(f"{model} {NOISE} 0", [*one_step, "--rounding-noise=0"])
        for backend in ON_ANY_MODEL:
            runs.add(f"{model} {backend}", with_backend(model, backend, folder, steps=1))
    for model in MODELS.keys() - set(COMPOSED):
        for backend in ON_ANY_MODEL:
            run = with_backend(model, backend, folder, steps=1, routed="composed")
            runs.add(f"{model} composed {backend}", run)
    _add_tiny(runs, folder)
    return runs


def _add_tiny(runs: OneRank, folder: Path) -> None:
    saved = (DUMP_FOLDER, str(folder / "saved"), "--training.steps", "5", "--checkpoint.enable")
    runs.add("saved", tiny(folder, "for_loop", *saved, "--checkpoint.interval", "3"))
    load = (*saved, "--checkpoint.load-only", "--checkpoint.load-step", "3")
    for draw in range(DRAWS):
        noise = f"--rounding-noise={draw}"
        runs.add(f"resumed {NOISE} {draw}", tiny(folder, "grouped_mm", *load, noise))
    # Back again: a composed run's checkpoint, resumed as one node.
    saved_composed = (DUMP_FOLDER, str(folder / "saved composed"), *saved[2:])
    for_loop = composed(folder, "for_loop")
    runs.add(
        "saved composed", tiny(folder, for_loop, *saved_composed, "--checkpoint.interval", "3")
    )
    resume_composed = (*saved_composed, *load[len(saved) :])
    runs.add("resumed from composed", tiny(folder, "for_loop", *resume_composed))
    for backend in ALL:
        runs.add(f"resumed {backend}", tiny(folder, backend, *load))
        runs.add(f"accumulated {backend}", tiny(folder, backend, *batch(whole=4)))
        runs.add(f"one batch {backend}", tiny(folder, backend, *batch(size=4)))
    for backend in ("grouped_mm", *COMPUTED_BY):
        runs.add(f"plain {backend}", tiny(folder, backend))
        runs.add(f"compiled {backend}", tiny(folder, backend, "--compile.enable"))
        runs.add(f"traced {backend}", tiny(folder, backend, *AOT))
        for mode in ("full", "selective"):
            runs.add(f"{mode} {backend}", tiny(folder, backend, checkpointing=mode))


@pytest.mark.parametrize(
    "run", ["deepseek_v3 grouped_mm", pytest.param("flavor", marks=pytest.mark.smoke)]
)
def test_grouped_mm_trains_with_the_hosts_bits(runs, run):
    """Through door 2 and through door 1: every loss, and every parameter after them."""
    assert set(runs["deepseek_v3 host"]["experts"]) == {EXPERTS}
    assert set(runs[run]["experts"]) == {f"Ezpz{EXPERTS}"}
    assert len(runs[run]["losses"]) == STEPS
    assert_same_bits(runs[run], runs["deepseek_v3 host"])


@pytest.mark.parametrize(("model", "backend"), ON_MODELS)
def test_every_moe_layer_computes_with_the_chosen_backend(runs, model, backend):
    host, ours = runs[f"{model} host"], runs[f"{model} {backend}"]
    assert ours["backends"] == [backend] * len(host["experts"])


@pytest.mark.parametrize(("model", "backend"), ON_MODELS)
def test_the_first_step_agrees_with_the_host(runs, model, backend):
    """Gradients differ by less than one more rounding makes."""
    host, noisy, ours = (runs[f"{model} {name}"] for name in ("host", f"{NOISE} 0", backend))
    assert_within_twice(ours["gradients"], noisy["gradients"], of=host["gradients"])


@pytest.mark.parametrize(("model", "backend"), COMPOSED_ON_MODELS)
def test_the_first_loss_of_a_composed_layer_has_the_hosts_bits(runs, model, backend):
    """As one node a layer adds its rows up in another order, and rounds elsewhere."""
    name = backend if model in COMPOSED else f"composed {backend}"
    host, ours = (runs[f"{model} {each}"] for each in ("host", name))
    assert ours["losses"][0] == host["losses"][0]


@pytest.mark.parametrize("backend", ON_ANY_MODEL)
def test_later_losses_agree_with_the_hosts(runs, backend):
    host, ours = (runs[f"deepseek_v3 {name}"]["losses"] for name in ("host", backend))
    draws = [runs[f"deepseek_v3 {NOISE} {draw}"]["losses"] for draw in range(DRAWS)]
    tolerance = 0.0
    for step, loss in enumerate(host):
        # Training amplifies differences: what one rounding has grown to so far, twice.
        tolerance = max(tolerance, *(2 * abs(noisy[step] - loss) for noisy in draws))
        assert abs(ours[step] - loss) <= tolerance, step


@pytest.mark.parametrize(
    "backend", ["grouped_mm", pytest.param("for_loop", marks=pytest.mark.smoke), *BACKENDS[1:]]
)
def test_a_checkpoint_goes_on_under_another_backend(runs, backend):
    """Three steps with for_loop, then the fourth with each: its forward has the same bits.

    Where the routed layer was one node and then is composed, it rounds once more.
    """
    whole, resumed = runs["saved"], runs[f"resumed {backend}"]
    assert len(resumed["losses"]) == 2
    difference = abs(resumed["losses"][0] - whole["losses"][3])
    if backend in LIKE_FOR_LOOP:
        assert difference == 0
    else:
        assert difference <= one_more_rounding(runs, resumed["losses"][0])
    if backend == "for_loop":
        assert resumed["losses"] == whole["losses"][3:]
        assert resumed["parameters"] == whole["parameters"]


@pytest.mark.full
@pytest.mark.skipif(NO_NODES, reason="this host's routed layers stay composed")
def test_a_composed_runs_checkpoint_goes_on_as_one_node(runs):
    whole, resumed = runs["saved composed"], runs["resumed from composed"]
    assert len(resumed["losses"]) == 2
    difference = abs(resumed["losses"][0] - whole["losses"][3])
    assert difference <= one_more_rounding(runs, runs["resumed grouped_mm"]["losses"][0])


def one_more_rounding(runs, loss: float) -> float:
    """Twice what it does to the loss of the host's run that resumes, in the worst of the draws."""
    assert runs["saved"]  # which they resume
    draws = [runs[f"resumed {NOISE} {draw}"]["losses"][0] for draw in range(DRAWS)]
    return 2 * max(abs(draw - loss) for draw in draws)


@pytest.mark.smoke
@pytest.mark.parametrize("backend", COMPUTED_BY)
def test_the_flavor_says_who_computes(runs, backend):
    assert set(runs[f"plain {backend}"]["backends"]) == {COMPUTED_BY[backend]}


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        case(mode, backend, short=backend in in_short)
        for mode, in_short in CHECKPOINTED_IN_SHORT.items()
        for backend in COMPUTED_BY
    ],
)
def test_activation_checkpointing_changes_no_bit(runs, mode, backend):
    assert_same_bits(runs[f"{mode} {backend}"], runs[f"plain {backend}"])


@pytest.mark.skipif(ON_0_2, reason="there tracing changes bits of the host's own model")
@pytest.mark.parametrize(
    "backend", [case(each, short=each in TRACED_IN_SHORT) for each in COMPUTED_BY]
)
def test_tracing_changes_no_bit(runs, backend):
    """Compiled for operators that are then called one by one: none is lost, none is doubled."""
    assert_same_bits(runs[f"traced {backend}"], runs[f"plain {backend}"])


@pytest.mark.parametrize(
    ("run", "other", "backend"),
    [
        *(case("compiled", "plain", backend, short=False) for backend in COMPUTED_BY),
        *(case("traced", "plain", backend, short=False) for backend in COMPUTED_BY if ON_0_2),
        *(case("accumulated", "one batch", backend, short=True) for backend in BACKENDS),
    ],
)
def test_gradients_deviate_like_the_hosts(runs, run, other, backend):
    """Fused kernels and partial sums round elsewhere: ours at most twice as much as the host's."""
    ours, host = (
        compare_gradients(runs[f"{run} {b}"]["gradients"], runs[f"{other} {b}"]["gradients"])
        for b in (backend, "grouped_mm")
    )
    for parameter, difference in ours.items():
        assert difference <= 2 * host[parameter] + 1e-6, parameter
