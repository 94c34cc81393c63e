"""Exports of what the trainer has trained, with biases that choose other experts than without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from ezpz_moe.hosts.detect import check_host, presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("builds models of torchtitan 0.3", allow_module_level=True)
check_host()  # before torchtitan is imported: it chooses the device

import dialect  # noqa: E402
import hf_cases  # noqa: E402
from hf_cases import CLASSES, WITH_BIASES, Case, Exports, load  # noqa: E402
from hf_models import BOUND, TOKENS_L, assert_same_logits, logits, opened  # noqa: E402
from trainer_runs import train  # noqa: E402

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]

STEPS = 3
BALANCE = """
[balance]
bias_update = "sign"
bias_rate = 0.1
"""
"""A rate at which the biases soon matter as much as the scores, which lie between 0 and 1. After an
odd number of steps, for with such a rate an even one may lead back to zero."""
TRAINING = """
[training]
local_batch_size = 1
seq_len = 128
steps = 3

[checkpoint]
enable = true
interval = 100

[activation_checkpoint]
mode = "none"
"""


class Trained:
    """Runs that begin with the weights of :class:`Exports`."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self.run = cache(self._run)

    def _run(self, kind: str) -> tuple[Case, Path]:
        """The case, and the run's last checkpoint."""
        case = self._exports.case(kind, BALANCE)
        _, start, _ = self._exports.plain(kind)
        job = Path(case.job)
        job.write_text(job.read_text() + TRAINING)
        family = "gpt_oss" if kind == "gpt_oss" else "deepseek_v3"
        flags = ["--tiny-bases", "--checkpoint.initial-load-path", str(start)]
        arguments = [*dialect.job(job, *flags), *dialect.precision(family)]
        train({"run": arguments}, case.folder, ranks=1)
        return case, case.folder / "run" / "checkpoint" / f"step-{STEPS}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Trained]:
    with pytest.MonkeyPatch.context() as patch:
        hf_cases.add_tiny_bases(patch)
        yield Trained(Exports(tmp_path_factory.mktemp("hf")))


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_a_trained_model_is_exported(trained, kind, tmp_path, capsys) -> None:
    """With its biases where the class has them, else without them and only when asked. And back."""
    case, step = trained.run(kind)
    weights = load(step)
    without = {name: 0 * w if "expert_bias" in name else w for name, w in weights.items()}
    target = tmp_path / "hf"
    capsys.readouterr()
    if CLASSES[kind] == WITH_BIASES:
        assert case.remap(step, target, "--to", "hf") == 0
        exported, other = weights, without
    else:
        with pytest.raises(SystemExit):
            case.remap(step, target, "--to", "hf")
        assert f"{CLASSES[kind]} has no place for them" in capsys.readouterr().err
        assert case.remap(step, target, "--to", "hf", "--drop-bias") == 0
        exported, other = without, weights
    ours_LV = case.logits(exported, TOKENS_L)
    assert_same_logits(logits(opened(target)), ours_LV)
    with pytest.raises(AssertionError):  # the biases do choose
        assert_same_logits(case.logits(other, TOKENS_L), ours_LV, 100 * BOUND)
    assert case.remap(target, tmp_path / "back", "--to", "0.3") == 0
    back = load(tmp_path / "back")
    assert all(torch.equal(back[name], exported[name]) for name in exported)
