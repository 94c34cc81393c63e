"""Validate on a whole text only if every data-parallel rank has as many steps of it."""

# No `from __future__ import annotations`: the host reads the fields of Config at run time.

from dataclasses import dataclass
from typing import Any

from torchtitan.components.validate import Validator

from ezpz_moe.hosts.documents import check_validation
from ezpz_moe.hosts.titan.base import titan


class WholeTextValidator(Validator):
    """The host's validator, which checks ``steps = -1`` before the run instead of hanging in it.

    Raises:
        EzpzError: the ranks have text for different numbers of steps.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        pass

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        if config.steps == -1 and self.dp_world_size > 1:
            # Each rank counts for all of them. That reads the text as often as one validation
            # does, and needs no collective, which is where a rank could wait for another.
            check_validation([self._steps_of(rank) for rank in range(self.dp_world_size)])

    def _steps_of(self, rank: int) -> int:
        batch, batches_per_step = titan().validation_batches(self)
        loader = self.dl_config.build(
            dp_world_size=self.dp_world_size, dp_rank=rank, tokenizer=self.tokenizer, **batch
        )
        return sum(1 for _ in loader) // batches_per_step
