"""What the ranks of a job have decided, one decision after the other, in the job's own store.

The first rank to publish a decision makes it for all. Nobody waits for anybody, so that it cannot
hang, whatever pipeline stage a rank is in; the others follow at their next look.
"""

import os
from collections.abc import Iterator

import torch

from ezpz_moe.compute.tuning import Question

ALONE_VARIABLE = "EZPZ_MOE_ALONE"
"""Where it is set, each rank decides alone: ``ezpz-moe tune`` wants what each of them measures."""


def decisions(question: Question, known: int) -> Iterator[str]:
    """Those made by now, without the first ``known``. Two requests to the store for each."""
    store = _store()
    while store is not None and store.check([_key(question, known)]):
        yield store.get(_key(question, known)).decode()
        known += 1


def decide(question: Question, known: int, winner: str) -> str:
    """Publish ``winner`` as the decision after the ``known`` ones.

    Returns:
        The one that stands: another rank may have been first.
    """
    store = _store()
    if store is None:
        return winner
    return store.compare_set(_key(question, known), "", winner).decode()


def _key(question: Question, number: int) -> str:
    return f"{question.key}/{number}"


def _store() -> torch.distributed.Store | None:
    if ALONE_VARIABLE in os.environ or not torch.distributed.is_initialized():
        return None
    if torch.distributed.get_backend() == "fake":
        return None  # a faked job's other ranks are not there, and its store holds nothing
    store = torch.distributed.distributed_c10d._get_default_store()
    return torch.distributed.PrefixStore("ezpz_moe/auto", store)
