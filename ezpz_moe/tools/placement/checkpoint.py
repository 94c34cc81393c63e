"""Whether a checkpoint can be written in another order, before anybody looks for one."""

from __future__ import annotations

from pathlib import Path

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.checkpoints import contents
from ezpz_moe.tools.checkpoints.folder import check_target


def check_copy(source: Path, target: Path) -> None:
    """Check what the files alone say, without torch.

    Raises:
        EzpzError: ``source`` holds no complete checkpoint, or ``target`` cannot be written.
    """
    check_target(target, source=source, needed=contents.inspect(source).bytes)


def check_model(source: Path, flavor: Flavor) -> None:
    """Check that a checkpoint holds the run's model, and that it is known what its experts have.

    Raises:
        EzpzError: it does not, or has the names of another generation than the installed host's.
    """
    # Not at the top: it imports torch.
    from ezpz_moe.tools.checkpoints.reordering import rows_of

    tensors = host().build_on_meta(flavor).state_dict()
    rows_of(source, contents.metadata_of_model(source, host().checkpoint_names, tensors))
