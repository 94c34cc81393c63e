"""What a checkpoint lacks or has too much of: begun afresh, left out, or refused in one line."""

from __future__ import annotations

import pytest

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.resuming import Fit, fit, rates_differ

GATE = "layers.1.moe.router.gate.weight"
BIAS = "layers.1.moe.expert_bias_E"
HEAD = "lm_head.weight"
MODEL = {GATE: (8, 64), BIAS: (8,), HEAD: (32, 64)}


def trained(*parameters: str) -> dict:
    """The optimizer's entries of parameters."""
    return {
        f"optimizer.{kind}.{name}.{key}": None
        for name in parameters
        for kind, key in (("state", "step"), ("state", "exp_avg"), ("param_groups", "lr"))
    }


STATE = {
    "train_state.step": None,
    "train_state.ntokens_seen": None,
    "lr_scheduler.last_epoch": None,
    "dataloader.dp_rank_0": None,
    "dataloader.world_size": None,
}
WHOLE = MODEL | trained(GATE, HEAD) | STATE


def fitted(wanted: dict, saved: dict, *, data_ranks: int | None = 1, whole=()) -> Fit:
    return fit(
        wanted,
        saved,
        where="out/checkpoint/step-4",
        data_ranks=data_ranks,
        whole_steps=lambda: whole,
    )


def refusal(wanted: dict, saved: dict, **more) -> str:
    with pytest.raises(EzpzError) as error:
        fitted(wanted, saved, **more)
    assert str(error.value).startswith("out/checkpoint/step-4: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def without(entries: dict, *parts: str) -> dict:
    return {name: shape for name, shape in entries.items() if not any(p in name for p in parts)}


def test_what_is_the_same_needs_no_words() -> None:
    assert fitted(WHOLE, WHOLE) == Fit()


def test_a_bias_may_be_missing_on_either_side() -> None:
    found = fitted(WHOLE, without(WHOLE, BIAS))
    assert found.afresh == {BIAS}
    assert found.notes == (f"the checkpoint has no {BIAS}: a selection bias begins at zero",)
    found = fitted(without(WHOLE, BIAS), WHOLE)
    assert not found.afresh
    assert found.notes == (f"the checkpoint's {BIAS} is left out: this run has no selection bias",)


def test_the_optimizers_state_of_a_parameter_may_be_missing_on_either_side() -> None:
    frozen = without(WHOLE, f"optimizer.state.{GATE}", f"optimizer.param_groups.{GATE}")
    found = fitted(WHOLE, frozen)
    assert found.afresh == set(trained(GATE))
    assert found.notes == (f"the checkpoint has no optimizer state of {GATE}, which begins afresh",)
    found = fitted(frozen, WHOLE)
    assert not found.afresh
    (note,) = found.notes
    assert note == f"the optimizer's state of {GATE} is left out: it is not trained any more"


def test_a_parameter_without_gradients_has_settings_and_no_state() -> None:
    """What `routing = "balanced"` saved before its gate was frozen."""
    saved = without(WHOLE, f"optimizer.state.{GATE}")
    found = fitted(WHOLE, saved)
    assert found.afresh == {name for name in trained(GATE) if ".state." in name}
    assert fitted(without(WHOLE, f"optimizer.state.{GATE}", f"groups.{GATE}"), saved) == Fit()


@pytest.mark.parametrize(
    ("wanted", "saved", "words"),
    [
        (
            WHOLE | {GATE: (10, 64)},
            WHOLE,
            f"is of another model: {GATE} is [8, 64] there and [10, 64] here. Use the flavor",
        ),
        (WHOLE | {"layers.2.w": (1,)}, WHOLE, "another model: layers.2.w is missing"),
        (
            WHOLE,
            WHOLE | {"layers.2.a": (1,), "layers.2.b": (1,), "layers.2.c": (1,)},
            "layers.2.a is only there; layers.2.b is only there; 1 more. Use",
        ),
        (
            WHOLE,
            without(WHOLE, "optimizer."),
            f"lacks optimizer.param_groups.{GATE}.lr and 5 more, which this run needs. To do "
            "without, resume with --checkpoint.exclude_from_loading optimizer.",
        ),
        (
            WHOLE,
            without(WHOLE, f"optimizer.state.{GATE}.exp_avg"),  # not all of its state
            f"lacks optimizer.state.{GATE}.exp_avg, which",
        ),
        (
            WHOLE,
            without(WHOLE, "dataloader", "lr_scheduler"),
            "resume with --checkpoint.exclude_from_loading dataloader lr_scheduler.",
        ),
    ],
    ids=["shape", "missing", "more", "no optimizer", "half a state", "no position"],
)
def test_what_no_setting_explains_is_refused(wanted, saved, words) -> None:
    assert words in refusal(wanted, saved)


def test_weights_alone_may_be_those_of_a_larger_model() -> None:
    larger = WHOLE | {"layers.2.w": (1,)}
    assert fitted(MODEL, larger, data_ranks=None) == Fit()
    assert "layers.2.w is missing" in refusal(MODEL | {"layers.2.w": (1,)}, MODEL)


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ((), "so no run can resume from it. To start a new run from its weights"),
        ((2, 10), "The newest whole checkpoint is step-10: resume with --checkpoint.load_step 10."),
    ],
)
def test_the_model_alone_is_refused_with_the_step_that_is_whole(whole, words) -> None:
    said = refusal(WHOLE, MODEL, whole=whole)
    assert "holds the model alone" in said
    assert words in said


def test_safetensors_hold_the_model_alone() -> None:
    assert "path, --checkpoint.initial_load_in_hf, and a new --dump_folder" in refusal(WHOLE, {})


@pytest.mark.parametrize("form", ["dataloader.dp_rank_{}", "dataloader.dp_rank_{}.sources.0"])
def test_another_number_of_data_parallel_ranks(form) -> None:
    """In the form of 0.3, and in that since August 2026."""
    saved = without(WHOLE, "dp_rank") | {form.format(rank): None for rank in range(2)}
    wanted = without(WHOLE, "dp_rank") | {form.format(0): None}
    assert fitted(wanted, saved, data_ranks=2) == Fit()
    said = refusal(wanted, saved, data_ranks=1)
    assert "the position in the data of 2 data-parallel rank(s), and this run has 1" in said
    assert "--checkpoint.exclude_from_loading dataloader" in said


def test_another_number_of_ranks_does_not_matter_to_a_run_that_starts_the_data_over() -> None:
    wanted = without(WHOLE, "dataloader")
    saved = WHOLE | {"dataloader.dp_rank_1": None}
    assert fitted(wanted, saved, data_ranks=None) == Fit()


def test_both_rates_are_said_if_they_differ() -> None:
    assert rates_differ(61, saved=0.1 + 0.2, ours=0.3) == ""
    said = rates_differ(61, saved=2e-3 / 3, ours=7.5e-4)
    assert "the learning rate of step 61 is 0.000666667 in the run that saved" in said
    assert "and 0.00075 in this job's schedule, which holds from step 62 on" in said
