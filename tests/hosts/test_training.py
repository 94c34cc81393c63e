"""What the unmodified trainer computes with the backends, in real runs on this machine.

- the host's own experts and ``compute_backend = "grouped_mm"``: the same bits, for ten steps;
- the other backends: the same within what one more rounding to bfloat16 does to the host itself;
- a checkpoint of one backend goes on under another;
- activation checkpointing, torch.compile and gradient accumulation change nothing else;
- the host's own deepseek_v3, qwen3 and gpt_oss take the backends, as far as they train on a CPU.
"""

import pytest
from dialect import (
    DUMP_FOLDER,
    EXPERTS,
    MODELS,
    ON_0_2,
    batch,
    by_flavor,
    stock,
    with_backend,
    write_text,
)
from trainer_runs import (
    BACKENDS,
    COMPUTED_BY,
    assert_same_bits,
    assert_within_twice,
    compare_gradients,
    door_1,
    job_folder,
    train,
)

ALL = ("grouped_mm", *BACKENDS)
ON_ANY_MODEL = BACKENDS if ON_0_2 else (*BACKENDS, "auto")
NOISE = "host, one more rounding"
DRAWS = 4
"""Of that rounding. One alone can be close to zero, and says nothing of what is usual then."""

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every single-process run of this file, by name."""
    folder = job_folder(tmp_path_factory.mktemp("single"))
    write_text(folder)
    ten_steps = stock("deepseek_v3", folder, steps=10)
    saved = (DUMP_FOLDER, str(folder / "saved"), "--training.steps", "8", "--checkpoint.enable")

    def tiny(backend: str, *flags: str, checkpointing: str = "none") -> list[str]:
        return door_1(folder, f"tiny_sdpa_{backend}", *flags, checkpointing=checkpointing)

    scenarios = {
        "deepseek_v3 host": ten_steps,
        "flavor": by_flavor(folder, steps=10),
        "saved": tiny("for_loop", *saved, "--checkpoint.interval", "5"),
    }
    for draw in range(DRAWS):
        scenarios[f"deepseek_v3 {NOISE} {draw}"] = [*ten_steps, f"--rounding-noise={draw}"]
    for backend in ("grouped_mm", *ON_ANY_MODEL):
        run = with_backend("deepseek_v3", backend, folder, steps=10)
        scenarios[f"deepseek_v3 {backend}"] = run
    for backend in ALL:
        scenarios |= {
            f"resumed {backend}": tiny(
                backend, *saved, "--checkpoint.load-only", "--checkpoint.load-step", "5"
            ),
            f"accumulated {backend}": tiny(backend, *batch(whole=4)),
            f"one batch {backend}": tiny(backend, *batch(size=4)),
        }
    for backend in ("grouped_mm", *COMPUTED_BY):
        scenarios |= {
            f"plain {backend}": tiny(backend),
            f"compiled {backend}": tiny(backend, "--compile.enable"),
        }
    for backend in COMPUTED_BY:
        scenarios |= {
            f"full {backend}": tiny(backend, checkpointing="full"),
            f"selective {backend}": tiny(backend, checkpointing="selective"),
        }
    for model in sorted(MODELS.keys() - {"deepseek_v3"}):
        one_step = stock(model, folder, steps=1)
        scenarios[f"{model} host"] = one_step
        scenarios[f"{model} {NOISE} 0"] = [*one_step, "--rounding-noise=0"]
        scenarios |= {
            f"{model} {backend}": with_backend(model, backend, folder, steps=1)
            for backend in ON_ANY_MODEL
        }
    records = train(scenarios, folder, ranks=1)
    return {name: ranks[0] for name, ranks in records.items()}


@pytest.mark.parametrize("run", ["deepseek_v3 grouped_mm", "flavor"])
def test_grouped_mm_trains_with_the_hosts_bits(runs, run):
    """Through door 2 and through door 1: ten losses, and every parameter after them."""
    assert set(runs["deepseek_v3 host"]["experts"]) == {EXPERTS}
    assert set(runs[run]["experts"]) == {f"Ezpz{EXPERTS}"}
    assert len(runs[run]["losses"]) == 10
    assert_same_bits(runs[run], runs["deepseek_v3 host"])


@pytest.mark.parametrize("backend", ON_ANY_MODEL)
@pytest.mark.parametrize("model", MODELS)
def test_every_moe_layer_computes_with_the_chosen_backend(runs, model, backend):
    host, ours = runs[f"{model} host"], runs[f"{model} {backend}"]
    assert ours["backends"] == [backend] * len(host["experts"])


@pytest.mark.parametrize("backend", ON_ANY_MODEL)
@pytest.mark.parametrize("model", MODELS)
def test_the_first_step_agrees_with_the_host(runs, model, backend):
    """The loss has the host's bits; gradients differ by less than one more rounding makes."""
    host, noisy, ours = (runs[f"{model} {name}"] for name in ("host", f"{NOISE} 0", backend))
    assert ours["losses"][0] == host["losses"][0]
    assert_within_twice(ours["gradients"], noisy["gradients"], of=host["gradients"])


@pytest.mark.parametrize("backend", ON_ANY_MODEL)
def test_ten_losses_agree_with_the_hosts(runs, backend):
    host, ours = (runs[f"deepseek_v3 {name}"]["losses"] for name in ("host", backend))
    draws = [runs[f"deepseek_v3 {NOISE} {draw}"]["losses"] for draw in range(DRAWS)]
    tolerance = 0.0
    for step, loss in enumerate(host):
        # Training amplifies differences: what one rounding has grown to so far, twice.
        tolerance = max(tolerance, *(2 * abs(noisy[step] - loss) for noisy in draws))
        assert abs(ours[step] - loss) <= tolerance, step


@pytest.mark.parametrize("backend", ALL)
def test_a_checkpoint_goes_on_under_another_backend(runs, backend):
    """Five steps with for_loop, then the sixth with each backend: its forward has the same bits."""
    resumed, whole = runs[f"resumed {backend}"], runs["saved"]
    assert len(resumed["losses"]) == 3
    assert resumed["losses"][0] == whole["losses"][5]
    if backend == "for_loop":
        assert resumed["losses"] == whole["losses"][5:]
        assert resumed["parameters"] == whole["parameters"]


@pytest.mark.parametrize("backend", COMPUTED_BY)
def test_the_flavor_says_who_computes(runs, backend):
    assert set(runs[f"plain {backend}"]["backends"]) == {COMPUTED_BY[backend]}


@pytest.mark.parametrize("backend", COMPUTED_BY)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit(runs, mode, backend):
    assert_same_bits(runs[f"{mode} {backend}"], runs[f"plain {backend}"])


@pytest.mark.parametrize(
    ("run", "other", "backend"),
    [
        *(("compiled", "plain", backend) for backend in COMPUTED_BY),
        *(("accumulated", "one batch", backend) for backend in BACKENDS),
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
