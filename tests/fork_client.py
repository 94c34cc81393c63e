"""``python``, for whoever starts processes that import torch and the host: see fork_server.py.

Run by itself from the server's folder, with nothing of the project imported: it hands its
arguments, environment, folder and open files to the server, passes signals on, and ends as the fork
did.
"""

import contextlib
import json
import os
import signal
import socket
import sys


def main() -> int:
    files = [number for number in map(int, os.listdir("/dev/fd")) if is_open(number)]
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "socket"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: server.send(bytes([received])))
    request = {
        "arguments": sys.argv[1:],
        "env": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
    }
    text = json.dumps(request).encode()
    socket.send_fds(server, [len(text).to_bytes(8, "big")], files)
    server.sendall(text)
    code = int(server.recv(16) or -signal.SIGKILL)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def is_open(number: int) -> bool:
    """Whether a file has this number; the folder that was listed has none any more."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
