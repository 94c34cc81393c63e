"""A process that has torch and the host imported already, and forks what tests would start.

Importing both costs ten seconds of a core, more than training the tests' model. So tests start
:func:`python` in place of ``sys.executable``: a small program that has the server fork itself and
become what ``python ARGUMENTS`` would be, with the same environment, folder, output, signals and
exit code (``fork_client.py``). What runs so cannot tell the difference but by what is imported
already; a test of that, or of how an interpreter ends, starts a real one. As ``PYTHON_EXEC`` it is
torchrun's interpreter too.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).parent
MOST_FILES = 16


def python(interpreter: str = sys.executable) -> str:
    """The program that stands for ``interpreter``, whose server lives as long as this process."""
    return _program(interpreter)


@functools.cache  # without a default: who leaves it out and who names it would have two servers
def _program(interpreter: str) -> str:
    # Not below a TMPDIR: the name of a socket may have some 100 characters only.
    folder = Path(tempfile.mkdtemp(prefix="ezpz-moe-", dir="/tmp"))
    program = folder / "python"
    program.write_text(f"#!{sys.executable} -SE\n{(HERE / 'fork_client.py').read_text()}")
    program.chmod(0o755)
    server = subprocess.Popen(
        [interpreter, __file__, str(folder / "socket")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the same sums on every machine
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # which ends it; handlers run last in, first out
    assert server.stdout.readline() == b"ready\n", "the fork server did not start"
    return str(program)


# The server -----------------------------------------------------------------------------------


class Server:
    """Forks for each client that connects, until standard input ends."""

    def __init__(self, path: str) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen(64)
        self._ready = selectors.DefaultSelector()
        self._clients: dict[int, socket.socket] = {}
        """Process number -> who is waiting for its end."""

    def serve(self) -> None:
        with self._ready as ready:
            ready.register(0, selectors.EVENT_READ, "the end")
            ready.register(self._listening, selectors.EVENT_READ, "a client")
            while True:
                for key, _ in ready.select(timeout=0.01 if self._clients else None):
                    if key.data == "the end":
                        return self._end()
                    if key.data == "a client":
                        client = self._listening.accept()[0]
                        ready.register(client, selectors.EVENT_READ, self._start(client))
                    else:
                        self._hear(key.data, key.fileobj)
                for client in self._ended():
                    ready.unregister(client)
                    client.close()

    def _start(self, client: socket.socket) -> int:
        """The number of the process that a client has asked for."""
        length, files, *_ = socket.recv_fds(client, 8, MOST_FILES)
        text = client.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
        pid = os.fork()
        if pid == 0:
            for each in (self._ready, self._listening, client, *self._clients.values()):
                each.close()
            _become(json.loads(text), files)
        for file in files:
            os.close(file)
        self._clients[pid] = client
        return pid

    def _hear(self, pid: int, client: socket.socket) -> None:
        """Hand a signal on; a client that is gone was killed."""
        numbers = client.recv(16)
        with contextlib.suppress(ProcessLookupError):
            for number in numbers:
                os.kill(pid, number)
            if not numbers:
                os.killpg(pid, signal.SIGKILL)

    def _ended(self) -> list[socket.socket]:
        """Those whose process has ended, told so."""
        told = []
        while self._clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            client = self._clients.pop(pid)
            with contextlib.suppress(OSError):
                client.send(str(os.waitstatus_to_exitcode(status)).encode())
            told.append(client)
        return told

    def _end(self) -> None:
        for pid in self._clients:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _become(request: dict, files: list[int]) -> None:
    """Run a request in this process, and end."""
    code = 1
    try:
        os.setsid()  # it is killed with all that it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _give_files(files, request["files"])
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ |= request["env"]
        code = _run(request["arguments"])
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        if code == -signal.SIGINT:  # as an interpreter ends
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code)


def _give_files(files: list[int], numbers: list[int]) -> None:
    """Let the client's files have the numbers here that they have there."""
    beyond = [fcntl.fcntl(file, fcntl.F_DUPFD, 512) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(beyond, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _run(arguments: list[str]) -> int:
    """The exit code of ``python ARGUMENTS``; options such as -u are as those of this process."""
    while arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        arguments = arguments[1:]
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            _tell_host(arguments[2:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _tell_host(arguments: list[str]) -> None:
    """Give torchtitan 0.2 its command line: it remembers that of when it was imported."""
    from torchtitan.config import ConfigManager

    for default in ConfigManager.parse_args.__defaults__ or ():
        if isinstance(default, list):
            default[:] = arguments


def import_host() -> None:
    """Import all that a run imports, so that no fork has to."""
    from ezpz_moe.hosts.detect import check_host, host
    from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02

    check_host()  # with its device
    importlib.import_module(f"torchtitan.{'train' if type(host()) is Titan02 else 'trainer'}")
    for name in ("torch._inductor.compile_fx", "torch.distributed.checkpoint"):
        importlib.import_module(name)
    for module in host().modules():
        importlib.import_module(module)
    from dialect import PARSED_AT_ONCE
    from torchtitan.config import ConfigManager

    # Reads the sources that the host's command line takes its help from. Nothing of ours is asked:
    # what it remembers would be the forks' too.
    ConfigManager().parse_args(PARSED_AT_ONCE)


def main(path: str) -> None:
    server = Server(path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; then input ends
    with contextlib.redirect_stdout(sys.stderr):
        import_host()
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
