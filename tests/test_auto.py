"""``auto``: it measures, remembers, agrees with the other ranks, and asks again when load changes.

Times are set by hand here, so that nothing depends on the machine; the numbers that ``auto``
computes are judged with every other backend's in ``test_contract.py``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from contract_cases import ROUTINGS, Pattern, make_case, make_routed_case
from torch.testing._internal.distributed.fake_pg import FakeStore

from ezpz_moe.compute import agreement, choosing, get_backend, tuning
from ezpz_moe.compute.backends import auto
from ezpz_moe.compute.reference import run
from ezpz_moe.errors import EzpzError

EVEN = Pattern((8, 8, 8, 8))
HOT = Pattern((32, 0, 0, 0))
NAMES = "for_loop batched_mm_padded"


class _Clock:
    """In place of :func:`tuning.measure`: sets what each backend takes, counts the questions."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.asked = 0

    def __call__(self, runs, device) -> tuning.Measured:
        self.asked += 1
        for one_pass in runs.values():
            one_pass()
        times = {name: self.milliseconds[name] for name in runs}
        return tuning.Measured(dict(sorted(times.items(), key=lambda item: item[1])))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Clock:
    """A process that knows nothing yet, in which for_loop is the faster of the two."""
    clock = _Clock(for_loop=1.0, batched_mm_padded=2.0)
    monkeypatch.setattr(tuning, "measure", clock)
    monkeypatch.setenv("EZPZ_MOE_CACHE", str(tmp_path))
    _forget(monkeypatch)
    return clock


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_CHOICES", {})


def _winners() -> list[str]:
    return [choice.winner for choice in auto._CHOICES.values()]


def _compute(
    pattern: Pattern = EVEN,
    *,
    calls: int = 1,
    options: str = "",
    dtype: torch.dtype = torch.float32,
    **ffn,
) -> None:
    for _ in range(calls):
        case = make_case(pattern, dtype=dtype, **ffn)
        run(get_backend(f"auto(among='{NAMES}'{options})").ffn, case)


@pytest.mark.parametrize("faster", NAMES.split())
def test_the_fastest_computes(clock: _Clock, faster: str) -> None:
    clock.milliseconds[faster] = 0.5
    _compute(calls=3)
    assert _winners() == [faster]
    assert clock.asked == 1


def test_each_is_timed_by_its_own_kernels(clock: _Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    compute = choosing.KernelBackend.compute

    def watched(backend, kernel, *tensors):
        computed.append(backend.name)
        return compute(backend, kernel, *tensors)

    def measure(runs, device):
        for name, one_pass in runs.items():
            computed.clear()
            one_pass()
            assert computed == [name, name]  # forward, backward
        return clock(runs, device)

    monkeypatch.setattr(choosing.KernelBackend, "compute", watched)
    monkeypatch.setattr(tuning, "measure", measure)
    _compute()
    assert clock.asked == 1


def test_other_sizes_are_another_question(clock: _Clock) -> None:
    _compute(EVEN)
    _compute(Pattern((8, 8, 8)))
    _compute(Pattern((8, 8, 8, 9)))  # as many experts, other rows
    assert clock.asked == 2


def test_recomputing_is_another_question(clock: _Clock) -> None:
    _compute()
    _compute(options=", recompute=true")
    assert clock.asked == 2


def test_another_dtype_is_another_question(clock: _Clock) -> None:
    """In the process, and in what is kept on disk for the next one."""
    _compute()
    clock.milliseconds["batched_mm_padded"] = 0.5
    _compute(dtype=torch.float64)
    assert clock.asked == 2
    assert _winners() == ["for_loop", "batched_mm_padded"]
    assert sorted(each.question.dtype for each, _ in tuning.recorded()) == ["float32", "float64"]


def test_another_ffn_is_another_question(clock: _Clock) -> None:
    """Without a gate there are two products, not three, and biases take passes of their own."""
    _compute()
    clock.milliseconds["batched_mm_padded"] = 0.5
    _compute(activation="gelu")
    _compute(biased=True)
    assert _winners() == ["for_loop", "batched_mm_padded", "batched_mm_padded"]
    assert {each.question.ffn for each, _ in tuning.recorded()} == {
        "swiglu",
        "gelu",
        "swiglu with biases",
    }


def test_another_allocator_is_another_question(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compute()
    monkeypatch.setattr(tuning, "device_name", tuning.device_name.__wrapped__)  # a new process
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    _forget(monkeypatch)
    _compute()
    assert clock.asked == 2


@pytest.mark.parametrize(("options", "given"), [("", True), (", recompute=true", False)])
def test_backward_is_timed_with_what_it_will_be_given(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, options: str, given: bool
) -> None:
    kernels = get_backend("for_loop").operators.kernels
    backward, gates = kernels.ffn_backward, []

    def watched(*arguments):
        gates.append(arguments[10] is not None)
        return backward(*arguments)

    monkeypatch.setattr(choosing, "get_backend", lambda _: get_backend("for_loop"))
    watching = dataclasses.replace(kernels, ffn_backward=watched)
    monkeypatch.setattr(get_backend("for_loop").operators, "kernels", watching)
    _compute(options=options)
    assert gates == [given] * 3  # two that are timed, and the one that counts


@pytest.mark.parametrize("faster", NAMES.split())
def test_a_routed_layer_is_a_question_of_its_own(clock: _Clock, faster: str) -> None:
    backend = get_backend(f"auto(among='{NAMES}')")
    _compute()
    clock.milliseconds |= {"for_loop": 1.0, "batched_mm_padded": 1.0, faster: 0.5}
    case = make_routed_case(ROUTINGS["uneven"])
    for _ in range(2):
        run(backend.routed, case)
    assert (clock.asked, _winners()) == (2, ["for_loop", faster])
    (routed,) = (each for each in auto._CHOICES if each.product == "routed")
    assert (routed.question.product, routed.question.sizes) == ("routed", (4, 48, 32))
    assert routed.question.key != dataclasses.replace(routed.question, product="ffn").key


def test_telemetry_knows_who_computes_a_routed_layer(clock: _Clock) -> None:
    backend = get_backend(f"auto(among='{NAMES}')")
    clock.milliseconds["batched_mm_padded"] = 0.5
    case = make_routed_case(ROUTINGS["cut"])
    given = (case.num_tokens_per_expert_E, case.num_rows)
    assert (backend.chosen, backend.rows_used(*given)) == ((), None)
    run(backend.routed, case)
    assert backend.chosen == ("batched_mm_padded",)
    expected = get_backend("batched_mm_padded").rows_used(*given)
    assert backend.rows_used(*given).tolist() == expected.tolist()


@pytest.mark.parametrize(("options", "given"), [("", True), (", recompute=true", False)])
def test_a_routed_layer_is_timed_with_what_backward_will_be_given(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, options: str, given: bool
) -> None:
    kernels = get_backend("for_loop").operators.kernels
    saved = []

    def watched(*arguments):
        *_, gate_RF, up_RF, order_R, _, _ = arguments
        saved.append((gate_RF is not None, up_RF is not None, order_R is not None))
        return kernels.routed_backward(*arguments)

    watching = dataclasses.replace(kernels, routed_backward=watched)
    monkeypatch.setattr(get_backend("for_loop").operators, "kernels", watching)
    run(get_backend(f"auto(among='for_loop'{options})").routed, make_routed_case(ROUTINGS["cut"]))
    assert saved == [(given, given, True)] * 2  # one that is timed, and the one that counts


def test_what_was_measured_is_remembered_on_disk(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _compute()
    (file,) = (tmp_path / "auto").iterdir()
    record = json.loads(file.read_text())
    assert record["milliseconds"] == clock.milliseconds
    assert record["question"]["sizes"] == [4, 48, 32]
    _forget(monkeypatch)
    clock.milliseconds["batched_mm_padded"] = 0.5
    _compute()
    assert (clock.asked, _winners()) == (1, ["for_loop"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"milliseconds": {"for_loop": 1}}',
        '{"milliseconds": {"for_loop": "fast", "batched_mm_padded": 2}}',
        '{"milliseconds": ["for_loop", "batched_mm_padded"]}',
    ],
)
def test_a_broken_file_is_measured_anew(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    _compute()
    (file,) = (tmp_path / "auto").iterdir()
    file.write_text(text)
    _forget(monkeypatch)
    _compute()
    assert clock.asked == 2
    assert json.loads(file.read_text())["milliseconds"] == clock.milliseconds


def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EZPZ_MOE_CACHE", str(tmp_path / "file"))
    caplog.set_level(logging.WARNING)
    _compute()
    assert _winners() == ["for_loop"]
    assert "set EZPZ_MOE_CACHE to another folder" in caplog.text


def test_a_lasting_change_of_the_load_asks_again_and_one_odd_batch_does_not(clock: _Clock) -> None:
    _compute(EVEN)
    looks = auto._EVERY
    _compute(EVEN, calls=looks - 1)
    _compute(HOT)  # a look: 4 x the mean, after one of 1 x
    assert clock.asked == 1
    _compute(HOT, calls=looks)  # the next look: most are at 4 x now
    assert clock.asked == 2
    _compute(HOT, calls=looks)
    assert clock.asked == 2


def test_a_load_that_goes_to_and_fro_asks_once_for_each_class(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing can be kept on disk."""
    monkeypatch.setattr(tuning, "remember", lambda *_: None)
    monkeypatch.setattr(auto, "_EVERY", 1)
    monkeypatch.setattr(choosing, "_LOOKS", 1)
    for pattern in (EVEN, HOT, EVEN, HOT):
        _compute(pattern)
    assert clock.asked == 2


def test_a_rank_of_a_faked_job_decides_alone(clock: _Clock) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        _compute()
    finally:
        torch.distributed.destroy_process_group()
    assert (clock.asked, _winners()) == (1, ["for_loop"])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> torch.distributed.Store:
    """The job's, which all ranks have."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(agreement, "_store", lambda: store)
    return store


class _Rank:
    """One of several in this process, with its own knowledge and times."""

    def __init__(self, clock: _Clock, monkeypatch: pytest.MonkeyPatch, **milliseconds: float):
        self.clock, self.patch, self.milliseconds = clock, monkeypatch, milliseconds
        self.choices: dict = {}

    def compute(self, pattern: Pattern = EVEN, *, calls: int = 1) -> None:
        self.patch.setattr(auto, "_CHOICES", self.choices)
        self.patch.setattr(tuning, "_remembered", lambda situation: None)  # a node of its own
        self.clock.milliseconds = self.milliseconds
        _compute(pattern, calls=calls)

    @property
    def winner(self) -> str:
        (choice,) = self.choices.values()
        return choice.winner


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("others", [EVEN, HOT, Pattern((100, 90, 80, 100))])
def test_the_first_rank_to_publish_decides_for_all_and_each_says_so(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, caplog, others: Pattern
) -> None:
    """Whatever rows and loads the others have: expert parallelism gives each rank its own."""
    caplog.set_level(logging.INFO)
    first = _Rank(clock, monkeypatch, for_loop=1.0, batched_mm_padded=2.0)
    other = _Rank(clock, monkeypatch, for_loop=1.0, batched_mm_padded=0.5)
    first.compute()
    other.compute(others)
    assert (clock.asked, first.winner, other.winner) == (1, "for_loop", "for_loop")
    first, other = (r.message for r in caplog.records if "auto: for_loop" in r.message)
    assert "measured now" in first
    assert "measured by another rank" in other


@pytest.mark.usefixtures("store")
def test_when_the_load_of_one_rank_changes_all_follow_its_new_choice(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_LOOKS", 1)
    even = _Rank(clock, monkeypatch, for_loop=1.0, batched_mm_padded=2.0)
    hot = _Rank(clock, monkeypatch, for_loop=1.0, batched_mm_padded=2.0)
    even.compute()
    hot.compute()
    hot.milliseconds = {"for_loop": 2.0, "batched_mm_padded": 1.0}
    hot.compute(HOT, calls=auto._EVERY)
    assert (clock.asked, hot.winner) == (2, "batched_mm_padded")
    even.compute(calls=auto._EVERY)
    assert (clock.asked, even.winner) == (2, "batched_mm_padded")
    hot.compute(HOT, calls=auto._EVERY)  # nothing is new
    even.compute(calls=auto._EVERY)
    assert (clock.asked, hot.winner, even.winner) == (2, *["batched_mm_padded"] * 2)


def test_a_rank_that_has_measured_at_the_same_time_follows_the_first(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, store: torch.distributed.Store
) -> None:
    def published_meanwhile(runs, device):
        (layer,) = auto._CHOICES
        assert agreement.decide(layer.question, 0, "batched_mm_padded") == "batched_mm_padded"
        return clock(runs, device)

    monkeypatch.setattr(tuning, "measure", published_meanwhile)
    _compute()
    assert _winners() == ["batched_mm_padded"]


@pytest.mark.usefixtures("clock")
def test_each_rank_decides_alone_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``ezpz-moe tune`` does."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _compute()
        (layer,) = auto._CHOICES
        assert list(agreement.decisions(layer.question, 0)) == ["for_loop"]
        monkeypatch.setenv(agreement.ALONE_VARIABLE, "1")
        assert list(agreement.decisions(layer.question, 0)) == []
        assert agreement.decide(layer.question, 0, "batched_mm_padded") == "batched_mm_padded"
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_where_bits_have_to_be_the_same_nothing_is_timed_nor_remembered(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch, caplog, request: pytest.FixtureRequest
) -> None:
    caplog.set_level(logging.INFO)
    clock.milliseconds["batched_mm_padded"] = 0.5
    _compute()  # the cache now knows another one as the fastest
    assert _winners() == ["batched_mm_padded"]
    request.getfixturevalue("_deterministic")
    for start_anew in (False, True):  # measured in this process, or cached by another
        if start_anew:
            _forget(monkeypatch)
        _compute(HOT, calls=2)
        assert _winners() == ["for_loop"]
    assert clock.asked == 1
    said = [r.message for r in caplog.records if "deterministic algorithms are on" in r.message]
    assert len(said) == 2
    assert "auto: for_loop for ffn of 4 experts" in said[0]
    assert f"(the first of {NAMES}: " in said[0]


def test_it_says_whom_it_has_chosen(clock: _Clock) -> None:
    backend = get_backend(f"auto(among='{NAMES}')")
    assert backend.chosen == ()
    _compute()
    assert backend.chosen == ("for_loop",)
    assert get_backend("auto").chosen == ()  # its own layers have not computed
    assert get_backend("for_loop").chosen == ()


def test_no_rows_decide_nothing(clock: _Clock) -> None:
    """A rank may get none under expert parallelism."""
    _compute(Pattern((0, 0, 0, 0)))
    _compute(Pattern((0, 0, 0, 0), tail=8))
    assert clock.asked == 0
    _compute(calls=2)
    assert (clock.asked, _winners()) == (1, ["for_loop"])


def test_the_choice_is_logged_once(clock: _Clock, caplog) -> None:
    caplog.set_level(logging.INFO)
    _compute(calls=3)
    (line,) = (r.message for r in caplog.records if "auto: for_loop" in r.message)
    assert "4 experts 48 x 32, float32 on " in line
    assert "up to 32 rows, busiest expert 1 x the mean" in line
    assert "for_loop 1 ms, batched_mm_padded 2 ms" in line


def test_all_that_drop_nothing_are_candidates_unless_named() -> None:
    found = choosing.candidates("", torch.device("cpu"), torch.bfloat16)
    assert {"for_loop", "batched_mm_padded", "grouped_mm_fused"} <= set(found)
    assert not any(get_backend(name).drops_tokens for name in found)
    assert choosing.candidates(" ", torch.device("cpu"), torch.bfloat16) == found
    assert choosing.candidates(NAMES, torch.device("cpu"), torch.bfloat16) == NAMES.split()


def test_a_package_that_does_not_load_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str):
        if name == "broken":
            raise EzpzError("cannot be loaded")
        return get_backend(name)

    monkeypatch.setattr(choosing, "backend_names", lambda: ["broken", "for_loop"])
    monkeypatch.setattr(choosing, "get_backend", broken)
    assert choosing.candidates.__wrapped__("", torch.device("cpu"), torch.float32) == ["for_loop"]


def test_one_that_drops_tokens_is_said_and_counted_where_it_is_named(clock: _Clock) -> None:
    names = "for_loop batched_mm_capacity"
    backend = get_backend(f"auto(among='{names}')")
    assert backend.drops_tokens
    assert not get_backend("auto").drops_tokens
    clock.milliseconds = {"for_loop": 2.0, "batched_mm_capacity": 1.0}
    case = make_case(HOT)
    counts_E, rows = case.num_tokens_per_expert_E, len(case.x_RD)
    assert backend.rows_used(counts_E, rows) is None
    run(backend.ffn, case)
    expected = get_backend("batched_mm_capacity").rows_used(counts_E, rows)
    assert backend.rows_used(counts_E, rows).tolist() == expected.tolist()
    assert expected[1] > 0


def test_among_those_that_drop_tokens_the_first_choice_stays(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one in backward would give a gradient to tokens that forward has dropped."""
    monkeypatch.setattr(auto, "_EVERY", 1)
    monkeypatch.setattr(choosing, "_LOOKS", 1)
    clock.milliseconds = {"for_loop": 2.0, "batched_mm_capacity": 1.0}
    ffn = get_backend("auto(among='for_loop batched_mm_capacity')").ffn
    for pattern in (EVEN, HOT, EVEN):
        run(ffn, make_case(pattern))
    assert (clock.asked, _winners()) == (1, ["batched_mm_capacity"])


@pytest.mark.parametrize(
    ("among", "judged"),
    [
        ("for_loop batched_mm_capacity", "for_loop"),
        ("batched_mm_capacity", "batched_mm_capacity"),
        (NAMES, NAMES),
        ("", ""),
    ],
)
def test_its_numbers_are_judged_where_nothing_is_dropped(among: str, judged: str) -> None:
    lossless = get_backend(f"auto(among='{among}')").lossless
    if judged == "batched_mm_capacity":
        assert lossless == get_backend(judged).lossless
    else:
        assert lossless == get_backend(f"auto(among='{judged}')")


def test_one_that_drops_nothing_counts_every_row(clock: _Clock) -> None:
    case = make_case(HOT)
    _compute(HOT)
    backend = get_backend(f"auto(among='{NAMES}')")
    assert backend.rows_used(case.num_tokens_per_expert_E, len(case.x_RD)).tolist() == [32, 0]


def test_another_version_measures_anew(clock: _Clock) -> None:
    _compute()
    (layer,) = auto._CHOICES
    here = layer.question
    assert here.key != dataclasses.replace(here, ezpz_moe="0.0.0").key


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "auto(among='for_lop')",
            r"^compute_backend 'auto\(among='for_lop'\)': unknown .*Did you mean 'for_loop'",
        ),
        ("auto(among='auto')", r"auto\(among='auto'\).*auto cannot be chosen"),
        ("auto(among='for_loop grouped_mm')", r"grouped_mm cannot be chosen.*Name others"),
        ("auto(among='for_loop(recompute=true)')", r"Write auto\(recompute=true, among"),
    ],
)
def test_wrong_names_are_refused(wrong: str, message: str) -> None:
    with pytest.raises(EzpzError, match=message):
        get_backend(wrong)


def test_where_no_candidate_runs_it_says_so() -> None:
    backend = get_backend("auto(among='grouped_mm_fused')")
    (reason,) = backend.why_not(torch.device("cpu"), torch.float64)
    assert "add for_loop to" in reason
    assert not backend.why_not(torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="none of the backends to choose from runs on cpu"):
        run(backend.ffn, make_case(EVEN, dtype=torch.float64))
