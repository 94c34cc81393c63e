#!/usr/bin/env bash
# torch 2.14.1: torch.distributed.run.run(), called from a program of one's own, leaves its handlers.
#
# Once it has returned, SIGTERM still raises torchrun's SignalException. So a process that is
# forked later does not end when it is terminated: the exception climbs out of it into whatever called
# fork, which then goes on twice. Seen where pyroute2 ends its helpers with SIGTERM: the process of the
# tests came back as a second one, and both waited for each other.
# Seen, on Linux x86-64, Python 3.11:
#
#     torch 2.14.1
#     before: a fork that is terminated ends by SIGTERM
#     after:  a fork that is terminated raises SignalException and goes on
#
# Exits 0 while that is so, 1 when torch has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6
echo 'print("a rank")' > rank.py
cat > program.py <<'PYTHON'
import os
import signal
import sys
import time

import torch
from torch.distributed import run


def terminated_fork():
    """Terminate a fork that sleeps; return what became of it."""
    child = os.fork()
    if not child:
        try:
            time.sleep(60)
        except BaseException as error:
            os._exit(7 if type(error).__name__ == "SignalException" else 8)
        os._exit(9)
    time.sleep(1)
    os.kill(child, signal.SIGTERM)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"ends by {signal.Signals(os.WTERMSIG(status)).name}"
    said = {7: "raises SignalException and goes on"}
    return said.get(os.WEXITSTATUS(status), f"exits with {os.WEXITSTATUS(status)}")


print("torch", torch.__version__.split("+")[0])
before = terminated_fork()
run.run(run.parse_args(["--standalone", "--local-addr", "localhost", "rank.py"]))
after = terminated_fork()
print(f"before: a fork that is terminated {before}")
print(f"after:  a fork that is terminated {after}")
sys.exit((before, after) != ("ends by SIGTERM", "raises SignalException and goes on"))
PYTHON
"$python" program.py 2> errors || { cat errors; exit 1; }
