"""Extend the host's checkpoint manager for the jobs of this plugin.

The class only lists where the plugin takes part. What happens there is in modules beside it.
"""

# No `from __future__ import annotations`: the host's command line reads the fields of Config.

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torchtitan.components.checkpointer import MODEL, TRAIN_STATE, CheckpointManager
from torchtitan.tools import filesystem

from ezpz_moe.errors import exit_on_user_error
from ezpz_moe.hosts import run_folder
from ezpz_moe.hosts.dcp import expert_order
from ezpz_moe.hosts.titan import kept_settings, resuming, saving
from ezpz_moe.hosts.titan.stopping import Stopping, ctrl_c_unwrapped, end_of_run


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
            # Safetensors and a seed are the model alone, so asking for them is asking for that.
            if self._is_last_save_ours and (self.last_save_in_hf or self.create_seed_checkpoint):
                config: Any = self  # mypy knows only the slots that are added here
                config.last_save_model_only = True
            # Called by name: `super()` without arguments does not work in a dataclass with slots,
            # which is a new class.
            CheckpointManager.Config.__post_init__(self)

    _stopping: Stopping | None = None
    _expert_order: bytes | None = None
    """Which numbers the experts had at first, from the checkpoint that was loaded."""

    def _load(self, step: int = -1) -> bool:
        found = super()._load(step)
        # Only now: a run that could not load its step has not gone back.
        if not self.load_only:
            if step != -1 and torch.distributed.get_rank() == 0:
                run_folder.return_to(step, Path(self.folder))
            self._stopping = Stopping(passed=self.states[TRAIN_STATE].step)
        return found

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load what the checkpoint has for this run, and log what is begun afresh or left out."""
        is_remote = filesystem.is_remote(checkpoint_id)
        if not is_remote:
            with exit_on_user_error():
                self._expert_order = expert_order.read(Path(checkpoint_id))
        # Neither the host's adapters for safetensors nor remote folders let us look inside first.
        if from_hf or is_remote:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        with exit_on_user_error():
            part = resuming.what_fits(state_dict, Path(checkpoint_id))
        asked = kept_settings.settings(state_dict)
        damage = resuming.reporting_damage(Path(checkpoint_id), Path(self.folder))
        with exit_on_user_error(), damage, ctrl_c_unwrapped():
            super().dcp_load(part, checkpoint_id, from_hf, from_quantized)
        kept_settings.log_kept(state_dict, asked)

    def dcp_save(
        self, state_dict: dict[str, Any], checkpoint_id: str, *more: Any, **how: Any
    ) -> Any:
        """Save ``state_dict`` with its selection biases unrounded, beside the order of experts."""
        exact = saving.with_exact_biases(state_dict, self.states[MODEL].state_dict())
        saving.write_expert_order(checkpoint_id, self._expert_order)
        with ctrl_c_unwrapped():
            return super().dcp_save(exact, checkpoint_id, *more, **how)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        is_saved = self._save_or_say_why(curr_step, last_step)
        if self._stopping and last_step:
            self._stopping.finish()
        # The run ends by itself after its last step.
        if self._stopping and self._stopping.ends_at(curr_step) and not last_step:
            if not is_saved:
                self.interval = 1  # so that this step is due
                self._save_or_say_why(curr_step)
            self.maybe_wait_for_saving()
            raise end_of_run(self.states[TRAIN_STATE])
        return is_saved

    def _save_or_say_why(self, step: int, last_step: bool = False) -> bool:
        with exit_on_user_error(), saving.reporting_failure(Path(self.folder), step):
            is_saved = super()._save(step, last_step)
        if is_saved:
            self._saved_step = step
        return is_saved

    def _wait_for_saving(self) -> None:
        with exit_on_user_error(), saving.reporting_failure(Path(self.folder), self._saved_step):
            super()._wait_for_saving()

    def _close(self) -> None:
        if self._stopping:
            self._stopping.close()
        super()._close()
