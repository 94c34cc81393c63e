"""Extend the host's checkpoint manager for the jobs of this plugin.

The class only lists where the plugin takes part. What happens there is in modules beside it.
"""

# No `from __future__ import annotations`: the host's command line reads the fields of Config.

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torchtitan.components.checkpointer import TRAIN_STATE, CheckpointManager

from ezpz_moe.hosts import run_folder
from ezpz_moe.hosts.titan.stopping import Stopping, end_of_run


class Checkpointer(CheckpointManager):
    """``CheckpointManager`` with the plugin's part in loading and saving.

    The hooks of a disabled manager are never called: the host's public methods see to that.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        _is_last_save_ours: Annotated[bool, tyro.conf.Suppress] = False
        """Whether the job leaves ``last_save_model_only`` to the plugin, which keeps everything.

        The underscore keeps it out of the host's ``to_dict``, and so out of what a user sees.
        """

        def __post_init__(self) -> None:
            # Safetensors hold the model alone, so asking for them is asking for that.
            if self._is_last_save_ours and self.last_save_in_hf:
                self.last_save_model_only = True
            # Called by name: `super()` without arguments does not work in a dataclass with slots,
            # which is a new class.
            CheckpointManager.Config.__post_init__(self)

    _stopping: Stopping | None = None

    def __init__(self, config: Config, **parts: Any) -> None:
        super().__init__(config, **parts)

    def _load(self, step: int = -1) -> bool:
        found = super()._load(step)
        if not self.load_only:
            if step != -1 and torch.distributed.get_rank() == 0:
                run_folder.return_to(step, Path(self.folder))
            self._stopping = Stopping(passed=self.states[TRAIN_STATE].step)
        return found

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        saved = super()._save(curr_step, last_step)
        # The run ends by itself after its last step.
        if self._stopping and self._stopping.ends_at(curr_step) and not last_step:
            if not saved:
                self.interval = 1  # so that this step is due
                super()._save(curr_step)
            self.maybe_wait_for_saving()
            raise end_of_run(self.states[TRAIN_STATE])
        return saved

    def _close(self) -> None:
        if self._stopping:
            self._stopping.close()
        super()._close()
