"""Runs a Python program in a process that warm_server.py forks: `python -I -S warm_client.py SOCKET ARGUMENTS`.

The program has the arguments, folder, environment and open files of this process. Signals that ask it to end are passed
on to it, and this process ends as it does. Needs the standard library alone, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def start(
    address: str, arguments: Sequence[str], folder: str, environment: Mapping[str, str], files: Mapping[int, int]
) -> tuple[int, socket.socket]:
    """Start `python ARGUMENTS`.

    Args:
        address: of the server's socket.
        arguments: of Python.
        folder: the program's current folder.
        environment: all its variables.
        files: the numbers of its open files -> the numbers of these files here.

    Returns:
        The id of its process, which is killed when the connection is closed, and the connection for `exit_code`.
    """
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {
        "arguments": list(arguments),
        "folder": folder,
        "environment": dict(environment),
        "files": list(files),
    }
    message = json.dumps(request).encode()
    socket.send_fds(server, [struct.pack("!Q", len(message))], list(files.values()))
    server.sendall(message)
    return _receive(server), server


def send(process: int, number: int) -> None:
    """Send a program a signal; if it has ended, nothing happens."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def exit_code(server: socket.socket) -> int:
    """Wait for the end of a program; return its exit code, or the signal that ended it with a minus.

    Raises:
        TimeoutError: the socket's timeout.
    """
    return os.waitstatus_to_exitcode(_receive(server))


def _receive(server: socket.socket) -> int:
    message = server.recv(4)
    if not message:
        raise ConnectionError("the process that forks others has ended")
    (number,) = struct.unpack("!i", message)
    return int(number)


def _open_files() -> list[int]:
    """Return the numbers of the open files."""
    with os.scandir("/dev/fd") as entries:
        numbers = [int(entry.name) for entry in entries]
    return [number for number in numbers if _is_open(number)]  # that of the listing is closed again


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _leave_files(numbers: list[int]) -> None:
    """Close files, so that their readers see an end when the program closes them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in numbers:
        os.dup2(nothing, number, inheritable=False)


def main() -> None:
    """Run the program."""
    address, *arguments = sys.argv[1:]
    files = _open_files()
    folder = os.getcwd()  # noqa: PTH109 - pathlib takes as long as all else
    process, server = start(address, arguments, folder, os.environ, dict(zip(files, files, strict=True)))
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: send(process, number))
    _leave_files(files)
    code = exit_code(server)
    if code < 0:
        with contextlib.suppress(OSError):  # it is the one that cannot be set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
