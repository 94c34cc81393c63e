"""Alerts: what raises them, what does not, and that each is said once until it has ended."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from telemetry_cases import at, layer, record, run

from ezpz_moe import cli
from ezpz_moe.config.routing_schema import Balance, Router
from ezpz_moe.config.telemetry_schema import AlertThresholds
from ezpz_moe.telemetry.alerts import Alerts
from ezpz_moe.telemetry.json_lines import append
from ezpz_moe.telemetry.plot import plot
from ezpz_moe.telemetry.remedies import settings_of

EVEN = [1000] * 8


def said(counts_by_record, steps: int = 10, **settings) -> list[list[str]]:
    """What is said after each record of one layer."""
    alerts, thresholds = Alerts(), AlertThresholds(**settings)
    return [
        alerts.check(
            record(layer(counts_E), step=steps * number, steps=steps, thresholds=thresholds)
        )
        for number, counts_E in enumerate(counts_by_record, start=1)
    ]


def skewed(cv: float) -> list[int]:
    """Eight counts with this coefficient of variation."""
    return [round(1000 * (1 + sign * cv)) for sign in (1, -1)] * 4


def at_records(messages: list[list[str]], word: str) -> list[int]:
    """The numbers of the records after which an alert with this word was said."""
    return [
        number
        for number, each in enumerate(messages, start=1)
        for message in each
        if word in message
    ]


def test_a_balanced_run_raises_no_alert() -> None:
    alerts = Alerts()
    assert [message for each in run() for message in alerts.check(each)] == []


def test_experts_are_dead_after_so_many_steps_and_are_said_once() -> None:
    idle = [1000] * 6 + [0, 0]
    messages = said([EVEN, *[idle] * 15], alert_dead_steps=100)
    assert at_records(messages, "got no token") == [11]  # 10 idle records of 10 steps
    (message,) = messages[10]
    assert message.startswith(
        "step 110, layer 1: experts 6, 7 of 8 got no tokens for 100 steps "
        "([telemetry] alert_dead_steps = 100). Remedy: "
    )
    assert '[balance] aux_loss = 0.01 or bias_update = "sign"' in message


def test_a_token_starts_the_count_again_and_ends_the_alert() -> None:
    idle, awake = [1000] * 7 + [0], [1000] * 7 + [1]
    messages = said([*[idle] * 9, awake, *[idle] * 12, awake, *[idle] * 10], alert_dead_steps=100)
    assert at_records(messages, "expert 7 of 8") == [20, 33]


def test_an_expert_that_dies_later_is_told_of_too() -> None:
    one, two = [1000] * 7 + [0], [1000] * 6 + [0, 0]
    messages = said([one, *[two] * 3], alert_dead_steps=20)
    assert [at_records(messages, f"expert {expert} of") for expert in (7, 6)] == [[2], [3]]


def test_many_dead_experts_are_one_line() -> None:
    (messages,) = said([[4000] + [0] * 255], steps=100)
    (message,) = [each for each in messages if "got no token" in each]
    assert "experts 1, 2, 3, 4, 5, 6, 7, 8 and 247 more of 256 got no token" in message


def test_cv_is_compared_with_its_lowest() -> None:
    falls_and_rises = [skewed(cv) for cv in (0.8, *[0.2] * 20, *[0.5] * 20)]
    messages = said(falls_and_rises, alert_cv_rise=2.0)
    # From its lowest, 0.2 + 0.6 * 0.8**20 = 0.207, the running mean passes 0.414 where
    # 0.5 - (0.5 - 0.207) * 0.8**n > 0.414: at n = 6.
    assert at_records(messages, "CV") == [27]
    (message,) = messages[26]
    assert "load CV has risen to 0.423, above 0.414" in message
    assert "[telemetry] alert_cv_rise = 2 times its lowest, 0.207" in message
    assert "[balance] aux_loss" in message


def test_a_cv_that_only_falls_or_stays_high_is_no_rise() -> None:
    assert not any(said([skewed(cv) for cv in (0.9, 0.8, 0.7, *[0.6] * 50)]))


def test_one_uneven_batch_is_no_rise() -> None:
    assert not any(said([*[skewed(0.2)] * 5, skewed(0.9), *[skewed(0.2)] * 5]))


def test_no_rise_below_the_floor() -> None:
    """Ten times the lowest CV, and still 0.97 of the experts in effective use."""
    assert not any(said([*[skewed(0.02)] * 10, *[skewed(0.24)] * 50]))
    assert any(said([*[skewed(0.02)] * 10, *[skewed(0.27)] * 50]))


def test_chance_is_no_rise() -> None:
    """Even routing at random with two assignments for an expert has a CV of 0.7 by chance."""
    random = np.random.default_rng(0)
    even = [random.multinomial(2 * 64, [1 / 64] * 64) for _ in range(300)]
    lucky = [2] * 64  # a CV of 0, which every other is infinitely many times of
    assert not any(said([lucky, *even], alert_cv_rise=1.01))


def test_a_cv_at_its_threshold_is_not_told_of_again_and_again() -> None:
    # The running mean swings around the threshold by 0.05 * 0.2 / (2 - 0.2) = 0.006.
    swings = [*[skewed(0.2)] * 10, *[skewed(0.45), skewed(0.35)] * 40]
    assert len(at_records(said(swings), "CV")) == 1


def test_a_cv_that_rises_a_second_time_is_told_of_a_second_time() -> None:
    low, high = [skewed(0.2)] * 20, [skewed(0.6)] * 20
    assert len(at_records(said([*low, *high, *low, *high]), "CV")) == 2


def test_collapse_and_its_end() -> None:
    hot, mild = [8000, *[1] * 7], [4000, 400, 400, 400, 400, 400, 400, 400]
    messages = said([skewed(0.1), hot, hot, mild, hot], alert_cv_rise=1e9)
    assert at_records(messages, "router collapse") == [2, 5]
    (message,) = messages[1]
    assert message.startswith(
        "step 20, layer 1: router collapse: the load is that of 1.0 of 8 experts, below 2.8 "
        "([telemetry] alert_collapse = 0.25 of those beyond the 1 that a token uses). Remedy: "
    )
    assert 'set [balance] aux_loss = 0.01 or bias_update = "sign"; set [balance] z_loss' in message


def test_collapse_can_end_however_high_the_threshold() -> None:
    messages = said([[8000, *[1] * 7], EVEN, [8000, *[1] * 7]], alert_collapse=0.95)
    assert at_records(messages, "router collapse") == [1, 3]


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 3), (8, 7), (128, 8)])
def test_the_same_experts_for_every_token_are_collapse(experts: int, top_k: int) -> None:
    """exp(entropy) is k then, which may be most of the experts."""
    alerts = Alerts()
    alerts.check(record(layer([1000] * experts, top_k=top_k)))
    same = [8000] * top_k + [0] * (experts - top_k)
    messages = alerts.check(record(layer(same, top_k=top_k)))
    assert [m for m in messages if "router collapse" in m]


def test_a_token_that_uses_all_experts_cannot_collapse() -> None:
    assert not Alerts().check(record(layer([1000] * 7, top_k=7)))


def test_a_small_batch_over_many_experts_is_no_collapse() -> None:
    """50 assignments use at most 50 of 256 experts, under a quarter, whatever the router does."""
    assert not any(said([[1] * 50 + [0] * 206], steps=1))


def test_layers_are_watched_apart() -> None:
    alerts, in_20 = Alerts(), AlertThresholds(alert_dead_steps=20)
    idle, busy = [0, *EVEN[1:]], EVEN
    assert not alerts.check(record(layer(idle, 1), layer(busy, 2), thresholds=in_20))
    (message,) = alerts.check(record(layer(idle, 1), layer(idle, 2), thresholds=in_20))
    assert "layer 1: expert 0 " in message
    (message,) = alerts.check(record(layer(idle, 1), layer(idle, 2), thresholds=in_20))
    assert "layer 2: expert 0 " in message


def test_collapse_and_rise_are_said_of_each_layer() -> None:
    alerts = Alerts()
    hot = [8000, *[1] * 7]
    alerts.check(record(layer(skewed(0.1), 1), layer(hot, 2)))
    messages = [m for _ in range(9) for m in alerts.check(record(layer(hot, 1), layer(hot, 2)))]
    assert len(messages) == 2  # layer 2 had collapsed before, and its CV has not risen
    assert all("layer 1: " in message for message in messages)


@pytest.mark.parametrize("kind", ["got no token", "CV has risen", "router collapse"])
def test_layers_that_go_wrong_together_are_one_line_about_the_worst(kind: str) -> None:
    alerts = Alerts()
    fair, worst = [3000, *[0] * 7], [3000, *[0] * 15]
    alerts.check(record(*(layer([1000] * 8, number) for number in range(1, 12))))
    layers = [layer(worst if number == 4 else fair, number) for number in range(1, 12)]
    messages = [m for _ in range(20) for m in alerts.check(record(*layers)) if kind in m]
    (message,) = messages
    assert "layers 1, 2, 3, 4, 5, 6, 7, 8 and 3 more, of which layer 4 is the worst: " in message


def test_no_alert_while_the_learning_rate_warms_up() -> None:
    hot, limits = [8000, *[0] * 7], AlertThresholds(alert_dead_steps=30)
    said_at = {}
    alerts = Alerts()
    for step in range(10, 210, 10):
        of_step = record(layer(hot), step=step, warmup_steps=50, thresholds=limits)
        said_at[step] = [message.split(": ")[1][:12] for message in alerts.check(of_step)]
    # What is wrong at its end is said at once.
    assert {step: len(lines) for step, lines in said_at.items() if lines} == {60: 2}


def test_a_cv_that_rises_in_the_warm_up_sets_no_lowest() -> None:
    """A router that has learnt nothing spreads tokens evenly: that is no level to keep."""
    alerts = Alerts()
    rises = [*[skewed(0.05)] * 4, *[skewed(0.6)] * 40]
    for warmup_steps, number_said in ((0, 1), (200, 0)):
        alerts = Alerts()
        records = [
            record(layer(counts_E), step=10 * number, warmup_steps=warmup_steps)
            for number, counts_E in enumerate(rises, start=1)
        ]
        assert sum("CV" in m for each in records for m in alerts.check(each)) == number_said


HOT = [8000, *[0] * 7]
IN_FORCE = {
    "balance.aux_loss": 0.02,
    "balance.bias_update": "sign",
    "balance.bias_rate": 0.005,
    "balance.z_loss": 1e-3,
    "router.jitter_noise": 0.01,
}


def remedies(settings, bias_norm: float | None, **changed) -> list[str]:
    """Of every kind of alert, for a run with these settings."""
    alerts, messages = Alerts(), []
    for number in range(20):
        counts_E = HOT if number else EVEN
        of_step = record(layer(counts_E, bias_norm=bias_norm), settings=settings, **changed)
        messages += alerts.check(of_step)
    assert len(messages) == 3
    return [message.partition("Remedy: ")[2] for message in messages]


def test_what_is_in_force_is_raised_and_not_advised() -> None:
    for advice in remedies(IN_FORCE, bias_norm=0.1):
        assert "raise [balance] aux_loss above its 0.02" in advice
        assert "raise [balance] bias_rate above its 0.005" in advice
        assert 'bias_update = "sign"' not in advice
        assert "aux_loss = " not in advice
        assert "z_loss = " not in advice
        assert "jitter_noise" not in advice
    every = " ".join(remedies(IN_FORCE, bias_norm=0.1))
    assert every.count("raise [balance] z_loss above its 0.001") == 2  # a dead expert needs none


def test_losses_of_other_scopes_are_raised_where_they_stand() -> None:
    (advice, *_) = remedies({"balance.batch.aux_loss": 0.1}, bias_norm=None)
    assert 'raise [balance.batch] aux_loss above its 0.1 or bias_update = "sign"' in advice


@pytest.mark.parametrize(
    "tables",
    [
        {"sequence": {"z_loss": 0.001}},
        {"sequence": {"aux_loss": 0.001}},
        {"batch": {"z_loss": 0.001}, "global": {"z_loss": 0.001}},
        {"z_loss": 0.001, "scope": "global", "batch": {"z_loss": 0.001}},
    ],
)
def test_a_loss_that_is_advised_is_not_refused(tables) -> None:
    """In [balance] it would have a scope whose losses may stand in a table of their own."""
    settings = settings_of(Router(), Balance.model_validate(tables), None)
    advised = re.findall(
        r"set \[(balance[.a-z]*)\] (\w+) = ([\d.]+)", " ".join(remedies(settings, bias_norm=None))
    )
    assert advised
    for table, loss, value in advised:
        scope = table.removeprefix("balance").removeprefix(".")
        new = {loss: float(value)}
        followed = tables | ({scope: tables[scope] | new} if scope else new)
        Balance.model_validate(followed)


def test_the_models_own_bias_is_raised_by_naming_its_update() -> None:
    (advice, *_) = remedies({"balance.bias_rate": 0.001}, bias_norm=0.0)
    assert 'raise [balance] bias_rate above its 0.001 with bias_update = "sign"' in advice


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"router.freeze": True}, "remove [router] freeze"),
        ({"router.routing": "balanced"}, "skip_first_n_experts"),
        (
            {"router.routing": "sinkhorn", "router.sinkhorn_tolerance": 0.01},
            "raise [router] sinkhorn_iterations above its 100 if so many do not make the plan even "
            "(sinkhorn_tolerance = 0.01); in an even plan, too, tokens with nearly the same scores",
        ),
    ],
)
def test_what_a_routing_excludes_is_not_advised(settings, said: str) -> None:
    for advice in remedies(settings, bias_norm=None):
        assert said in advice
        assert "aux_loss" not in advice
        assert "bias_update" not in advice


def test_a_longer_warm_up_is_longer_than_the_runs() -> None:
    assert "warm it up for more than 7 steps" in " ".join(remedies({}, None, warmup_steps=7))


def test_the_settings_of_a_run_are_its_keys_that_differ_from_the_default() -> None:
    router = Router.model_validate({"jitter_noise": 0.01})
    rate = {"start": 0.1, "end": 0.2, "steps": 5}
    balance = Balance.model_validate({"aux_loss": 0.5, "bias_update": "sign", "bias_rate": rate})
    assert settings_of(router, balance, 0.001) == {
        "router.jitter_noise": 0.01,
        "balance.aux_loss": 0.5,
        "balance.bias_update": "sign",
        "balance.bias_rate": rate,
    }
    plain = Balance.model_validate({"bias_update": "sign", "bias_rate": 0.3})
    assert settings_of(Router(), plain, 0.001)["balance.bias_rate"] == 0.3
    assert settings_of(Router(), Balance(), 0.001) == {"balance.bias_rate": 0.001}
    assert settings_of(Router(), Balance(), None) == {}


def test_a_layer_that_saw_no_token_says_nothing_about_its_router() -> None:
    assert not any(said([[0] * 8] * 50, alert_dead_steps=1))


def test_all_tokens_to_zero_computation_experts_is_death_of_the_others() -> None:
    nowhere = layer([0, 0], zero_counts_Z=(500,), tokens=500)
    (message,) = Alerts().check(record(nowhere, thresholds=AlertThresholds(alert_dead_steps=10)))
    assert "experts 0, 1 of 2 got no token" in message


def test_remedies_are_keys_of_the_flavor() -> None:
    messages = said([EVEN, *[[8000, *[0] * 7]] * 20])
    remedies = " ".join(message.partition("Remedy: ")[2] for each in messages for message in each)
    assert remedies.count("learning rate") == 3  # all three kinds of alert
    keys = {"aux_loss", "bias_update", "z_loss", "jitter_noise"}
    assert all(key in remedies for key in keys)
    assert keys <= Balance.model_fields.keys() | Router.model_fields.keys()


@pytest.mark.parametrize("kind", ["got no token", "CV has risen", "router collapse"])
def test_every_alert_names_layer_value_threshold_and_remedy(kind: str) -> None:
    messages = said([EVEN, *[[8000, *[0] * 7]] * 20])
    (message,) = [message for each in messages for message in each if kind in message]
    assert message.startswith("step ")
    assert ", layer 1: " in message
    assert "[telemetry] alert_" in message
    assert "\n" not in message


def test_alerts_of_a_kind_are_one_with_one_remedy(tmp_path: Path, capsys) -> None:
    """Of two layers an expert dies, the second's 40 steps later."""
    even, dead = [4, 4, 4, 4], [6, 6, 4, 0]
    counts = [(even, dead)] * 5 + [(dead, dead)] * 5
    records = [
        at(record(layer(first, 1), layer(second, 2)), 20 * step)
        for step, (first, second) in enumerate(counts, start=1)
    ]
    own = AlertThresholds(alert_dead_steps=40)
    for each in records:
        append(tmp_path / "telemetry.jsonl", replace(each, thresholds=own))
    assert cli.main(["plot", str(tmp_path)]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "ALERT" in each]
    first, last = plot(tmp_path).alerts
    assert line == (
        f"ALERT experts without tokens: 2 alerts, steps {first.step} to {last.step}, "
        f"layers 1, 2. The last: {last.found}. Remedy: {last.remedy}."
    )
    shown = unescape((tmp_path / "telemetry" / "telemetry.html").read_text())
    assert shown.count(last.remedy) == 1
    assert all(each.found in shown for each in (first, last))
