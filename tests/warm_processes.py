"""Python programs in processes of their own that need not import the large libraries anew.

A short `kedro run` spends most of its time on imports. Here it is forked from a process that has imported
warm_libraries.py: one for all processes of pytest, which ends with the first of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import warm_client

_SERVER = "WARM_PYTHON_SERVER"  # the variable with the folder of the server, for the processes of pytest
_ENVIRONMENT = {  # read by imports
    "OMP_NUM_THREADS": "1",  # before a fork, no thread may exist
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # nor may CUDA be initialized
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRANSFORMERS_VERBOSITY": "error",  # of remarks on what is not installed
}
_HERE = Path(__file__).parent


@functools.cache
def _server() -> Path:
    """Return the folder of the server, which has its `socket` and `python`; the first call starts it."""
    if folder := os.environ.get(_SERVER):
        return Path(folder)
    folder = tempfile.mkdtemp(prefix="warm-")  # the server removes it
    client = shlex.join([sys.executable, "-I", "-S", str(_HERE / "warm_client.py"), f"{folder}/socket"])
    python = Path(folder, "python")
    python.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(64)  # clients wait until the libraries are imported
        server = subprocess.Popen(
            [sys.executable, _HERE / "warm_server.py", str(listener.fileno()), folder],
            stdin=subprocess.PIPE,  # which ends with this process, and with it the server
            pass_fds=[listener.fileno()],
            env=environment | _ENVIRONMENT,
        )
    _servers.append(server)
    os.environ[_SERVER] = folder
    return Path(folder)


_servers: list[subprocess.Popen[bytes]] = []  # an object that is forgotten closes its end of the pipe


def warm_python() -> str:
    """Return the path of a program that runs `-m MODULE …`, `-c CODE …` and `FILE …` as Python does, but warm."""
    return str(_server() / "python")


def warm_children() -> dict[str, str]:
    """Return the variables of a warm program whose `sys.executable` is warm, too."""
    return {"WARM_PYTHON": warm_python()}


def run_warm(
    arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` (`-m MODULE …`, `-c CODE …` or `FILE …`) in a folder, with these environment variables.

    Raises:
        subprocess.TimeoutExpired: the program took longer, and was killed.
    """
    with tempfile.TemporaryDirectory() as outputs:
        program = start_warm(arguments, folder, environment, Path(outputs))
        return program.wait(timeout_s)


@dataclass
class WarmProgram:
    """A program that was started; it is killed when this object is forgotten.

    Attributes:
        arguments: of Python.
        process: the id of its process.
        connection: to what has started it.
        outputs: files with what it has written so far: stdout, stderr.
    """

    arguments: tuple[str, ...]
    process: int
    connection: socket.socket
    outputs: tuple[Path, Path]
    _exit_code: int | None = None

    def ends_within(self, seconds: float) -> bool:
        """Wait for its end; return whether it came."""
        if self._exit_code is None:
            self.connection.settimeout(seconds)
            with contextlib.suppress(TimeoutError, BlockingIOError):
                self._exit_code = warm_client.exit_code(self.connection)
        return self._exit_code is not None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; if it has ended, nothing happens."""
        if not self.ends_within(0):
            warm_client.send(self.process, number)

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: the program took longer, and was killed.
        """
        if not self.ends_within(timeout_s):
            self.send(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.arguments, timeout_s)
        assert self._exit_code is not None
        return subprocess.CompletedProcess(self.arguments, self._exit_code, *map(_text_of, self.outputs))

    def read(self) -> str:
        """Return all that it has written so far, first to stdout, then to stderr."""
        return "".join(map(_text_of, self.outputs))


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def start_warm(arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str], outputs: Path) -> WarmProgram:
    """Start `python ARGUMENTS` as `run_warm` does; `outputs` is a folder for what it writes."""
    files = outputs / "stdout", outputs / "stderr"
    with Path(os.devnull).open("rb") as nothing, files[0].open("wb") as out, files[1].open("wb") as errors:
        streams = {number: file.fileno() for number, file in enumerate((nothing, out, errors))}
        process, connection = warm_client.start(str(_server() / "socket"), arguments, str(folder), environment, streams)
    return WarmProgram(arguments, process, connection, files)
