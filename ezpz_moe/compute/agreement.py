"""The decisions that the ranks of a job share, one after the other, in the job's own store.

The first rank to publish a decision makes it for all. Nobody waits for anybody, so nothing can
hang, whatever pipeline stage a rank is in; the other ranks follow at their next look.
"""

import os
from collections.abc import Iterator

import torch

from ezpz_moe.compute.tuning import Question

ALONE_VARIABLE = "EZPZ_MOE_ALONE"
"""If it is set, each rank decides alone: ``ezpz-moe tune`` needs what each of them measures."""


def decisions(question: Question, known: int) -> Iterator[str]:
    """Yield the decisions after the first ``known``. Each costs two requests to the store."""
    store = _store()
    # check() answers at once, whereas get() waits for a key that does not exist yet.
    while store is not None and store.check([_key(question, known)]):
        yield store.get(_key(question, known)).decode()
        known += 1


def decide(question: Question, known: int, winner: str) -> str:
    """Publish ``winner`` as the decision after the ``known`` ones.

    Returns:
        The decision that holds: another rank may have been first.
    """
    store = _store()
    if store is None:
        return winner
    # Writes only if nobody has decided yet, and returns the decision that then holds.
    return store.compare_set(_key(question, known), "", winner).decode()


def _key(question: Question, number: int) -> str:
    # Numbered, because a decision is never overwritten: when a load changes, the next one follows
    # it, and each rank reads on from those that it knows.
    return f"{question.key}/{number}"


def _store() -> torch.distributed.Store | None:
    if ALONE_VARIABLE in os.environ or not torch.distributed.is_initialized():
        return None
    if torch.distributed.get_backend() == "fake":
        return None  # a faked job has no other ranks, and its store holds nothing
    # A private function: torch has no public one. The prefix keeps our keys apart from torch's own,
    # which are in the same store.
    store = torch.distributed.distributed_c10d._get_default_store()
    return torch.distributed.PrefixStore("ezpz_moe/auto", store)
