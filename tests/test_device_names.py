"""A device of a kind that torch does not know is told without torch, and no other."""

from __future__ import annotations

import re

import pytest
import torch

from ezpz_moe.hosts import accelerator


@pytest.mark.filterwarnings("ignore:'mkldnn'")
def test_a_kind_of_device_is_unknown_where_torch_does_not_know_it(monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="Expected one of") as refusal:
        torch.device("cup")
    # torch lists what it knows.
    known = [name for name in re.findall(r"\w+", str(refusal.value)) if _is_device(name)]
    assert {"cpu", "cuda", "xpu", "meta", "privateuseone"} <= set(known)
    for name in (*known, *(f"{kind}:1" for kind in known)):
        assert not accelerator.is_certainly_unknown(name), name
    for name in ("cup", "cup:0", "cpux"):
        assert accelerator.is_certainly_unknown(name), name
        assert not _is_device(name)
    for name in ("", "cup:", "cup:x", "cup:01", "c p", "c\u00fcp", "cup1"):
        assert not accelerator.is_certainly_unknown(name), "torch says what is wrong with it"
    monkeypatch.setattr(accelerator.metadata, "entry_points", lambda group: ["torch_cup"])
    assert not accelerator.is_certainly_unknown("cup"), "a package may have brought it"


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
