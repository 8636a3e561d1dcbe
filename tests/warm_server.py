"""Forks the programs of warm_client.py from a process that has imported warm_libraries.py.

`python warm_server.py LISTENER FOLDER` serves until its standard input ends, and then removes the folder; LISTENER is
the number of the open socket. Programs differ from those of a new Python: all have the same hashes of texts, and the
encoding, limits and umask of the server.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import io
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy


@dataclass(frozen=True)
class _Request:
    """A program to run.

    Attributes:
        arguments: of Python.
        folder: the current folder.
        environment: all its variables.
        files: the numbers of its open files.
        descriptors: those files, as they are open here.
        client: who waits for the id of the process.
    """

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    files: list[int]
    descriptors: list[int]
    client: socket.socket

    @classmethod
    def read(cls, client: socket.socket) -> _Request:
        """Read it.

        Raises:
            OSError, struct.error, ValueError: the client has ended before it has sent all.
        """
        header, descriptors, *_ = socket.recv_fds(client, 8, 253)
        (length,) = struct.unpack("!Q", header)
        return cls(**json.loads(client.recv(length, socket.MSG_WAITALL)), descriptors=descriptors, client=client)


@dataclass
class _Server:
    """What waits for clients and for the ends of their programs.

    Attributes:
        listener: the socket that clients connect to.
        selector: of everything that is waited for.
        programs: process id -> the client of each running program.
    """

    listener: socket.socket
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    programs: dict[int, socket.socket] = field(default_factory=dict)

    def serve(self) -> _Request | None:
        """Return what this process has to run, if it is a forked one, and None at the end of the standard input."""
        ended, wakes = socket.socketpair()
        for end in (ended, wakes):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler, nothing wakes
        signal.set_wakeup_fd(wakes.fileno())
        for file in (sys.stdin, self.listener, ended):
            self.selector.register(file, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj: key.data for key, _ in self.selector.select()}
            if sys.stdin in ready:
                signal.set_wakeup_fd(-1)
                return None
            if ended in ready:
                ended.recv(4096)
                self._report_ends()
            for process in [process for process in ready.values() if process in self.programs]:
                self.selector.unregister(self.programs[process])
                self.kill(process)
            if self.listener in ready and (request := self._fork()):
                ended.close()
                wakes.close()
                return request

    def _fork(self) -> _Request | None:
        """Fork the process of a new client; return in it what it has to run."""
        client, _ = self.listener.accept()
        try:
            request = _Request.read(client)
        except (OSError, struct.error, ValueError):
            client.close()
            return None
        process = os.fork()
        if process:
            for descriptor in request.descriptors:
                os.close(descriptor)
            self.programs[process] = client
            self.selector.register(client, selectors.EVENT_READ, data=process)  # clients send nothing more, but end
            return None
        signal.set_wakeup_fd(-1)
        self.selector.close()
        for connection in (self.listener, *self.programs.values()):
            connection.close()
        return request

    def kill(self, *processes: int) -> None:
        """Kill programs and what they have started."""
        for process in processes:  # its id is not used anew before its end is reported
            with contextlib.suppress(ProcessLookupError):  # it has no session yet
                os.killpg(process, signal.SIGKILL)
            os.kill(process, signal.SIGKILL)

    def _report_ends(self) -> None:
        """Tell clients how their programs have ended."""
        with contextlib.suppress(ChildProcessError):  # there is none
            while True:
                process, status = os.waitpid(-1, os.WNOHANG)
                if not process:
                    return
                client = self.programs.pop(process)
                with contextlib.suppress(KeyError, ValueError):  # it was killed because its client is gone
                    self.selector.unregister(client)
                with contextlib.suppress(OSError):
                    client.sendall(struct.pack("!i", status))
                client.close()


def _become(request: _Request) -> None:
    """Give this process the session, signals, files, folder and environment of a new one."""
    os.setsid()  # what a terminal sends goes to the client, who passes it on
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    with request.client, contextlib.suppress(OSError):  # it is gone, and this process will be killed
        request.client.sendall(struct.pack("!i", os.getpid()))  # from now on, signals are answered
    above = max(request.files) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in request.descriptors]
    for descriptor in request.descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, request.files, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    numpy.random.seed()  # noqa: NPY002 - the generators of Python and torch start as in a new process by themselves
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.dont_write_bytecode = bool(request.environment.get("PYTHONDONTWRITEBYTECODE"))
    sys.executable = request.environment.get("WARM_PYTHON", sys.executable)


def _run(arguments: list[str]) -> None:
    """Run a program as `python ARGUMENTS` does."""
    kind, *others = arguments
    while kind in ("-u", "-B"):
        if kind == "-u":
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.dont_write_bytecode |= kind == "-B"
        kind, *others = others
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = {"-m": str(Path.cwd()), "-c": ""}.get(kind, str(Path(kind).resolve().parent))
    sys.path[:0] = [first, *paths]
    if kind == "-m":
        sys.argv[1:] = others[1:]
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = ["-c", *others[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec", dont_inherit=True), main.__dict__)
    elif kind.startswith("-"):
        raise SystemExit(f"a warm Python takes -m, -c or a file, and was given {kind}")
    else:
        sys.argv[:] = [kind, *others]
        runpy.run_path(kind, run_name="__main__")


def _run_to_the_end(arguments: list[str]) -> NoReturn:
    """Run a program and end as Python does, but without the second that it takes to forget all libraries."""
    code: object = 0
    try:
        _run(arguments)
    except SystemExit as error:
        code = error.code
    except BaseException as error:  # noqa: BLE001
        sys.excepthook(type(error), error, error.__traceback__)
        code = error if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed
            stream.flush()
    if isinstance(code, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    os._exit(code & 0xFF if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Serve; in a forked process, run a program."""
    listener, folder = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import warm_libraries  # noqa: F401

    sys.path.remove(str(Path(__file__).parent))
    server = _Server(socket.socket(fileno=int(listener)))
    if request := server.serve():
        assert not {"kedro", "dreamartist_pipeline"} & sys.modules.keys(), "imported before the run"
        _become(request)
        _run_to_the_end(request.arguments)
    server.kill(*server.programs)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
