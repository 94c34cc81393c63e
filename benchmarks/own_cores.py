"""Ranks that cannot use one another's time: each in a control group with a share of a core.

Where ranks share cores, one that waits leaves its core to another, as it cannot on machines of
their own. The kernel's quota takes that away: a rank's time then runs as on a slower core that is
its own. Needs Linux with the cpu controller of cgroup v1, and the right to make groups.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CONTROLLER = Path("/sys/fs/cgroup/cpu")
_PERIOD_US = 10_000  # short, so that no rank waits long for its next share
_PYTHON = """\
#!/bin/sh
echo $$ > {group}$LOCAL_RANK/cgroup.procs
exec {python} "$@"
"""


@contextlib.contextmanager
def own_cores(ranks: int, share: float) -> Iterator[None]:
    """Let torchrun start every rank in a group of its own, which gets ``share`` of a core."""
    if not os.access(_CONTROLLER, os.W_OK):
        sys.exit(f"groups of processes cannot be made in {_CONTROLLER} (cgroup v1, as root)")
    group = _CONTROLLER / f"ezpz-moe-{os.getpid()}-"
    with contextlib.ExitStack() as clean_up:
        for rank in range(ranks):
            own = Path(f"{group}{rank}")
            own.mkdir()
            clean_up.callback(own.rmdir)
            (own / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (own / "cpu.cfs_quota_us").write_text(str(int(share * _PERIOD_US)))
        folder = clean_up.enter_context(tempfile.TemporaryDirectory())
        python = Path(folder, "python")
        python.write_text(_PYTHON.format(group=group, python=sys.executable))
        python.chmod(0o755)
        os.environ["PYTHON_EXEC"] = str(python)  # torchrun's own variable
        clean_up.callback(os.environ.pop, "PYTHON_EXEC")
        yield
