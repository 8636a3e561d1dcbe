"""Programs that are forked from the process with the libraries run and end as those of a new Python do."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from warm_processes import run_warm, start_warm, warm_python

_WAITS = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit",
        "raise SystemExit(3)",
        "raise SystemExit(-2)",
        "raise SystemExit('why')",
        "1 / 0",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os; os.abort()",
    ],
)
def test_a_program_ends_as_with_a_new_python(code: str, tmp_path: Path) -> None:
    cold, warm = (
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        for python in (sys.executable, warm_python())
    )
    assert warm.returncode == cold.returncode == run_warm(("-c", code), tmp_path, os.environ, 60).returncode
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


def test_a_program_has_the_files_arguments_folder_and_variables_of_its_client(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.stdin.read(), sys.argv, os.getcwd(), os.environ['A'], sys.path[:2])"
    received, sent = os.pipe()
    done = subprocess.run(
        [warm_python(), "-c", f"{code}; os.write({sent}, b'file')", "x"],
        input="text",
        cwd=tmp_path,
        env={"A": "a", "PYTHONPATH": "/p"},
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[sent],
        check=True,
    )
    assert done.stdout == f"text ['-c', 'x'] {tmp_path} a ['', '/p']\n"
    assert os.read(received, 10) == b"file"
    os.close(received)
    os.close(sent)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_client_ends_the_program(number: signal.Signals) -> None:
    command = [warm_python(), "-c", f"import os; print(os.getpid(), flush=True); {_WAITS}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as client:
        assert client.stdout is not None
        program = psutil.Process(int(client.stdout.readline()))
        assert client.stdout.readline() == "ready\n"
        client.send_signal(number)
        assert client.wait(60) == -number
        program.wait(60)


def test_a_client_that_is_gone_early_harms_no_other(tmp_path: Path) -> None:
    address = str(Path(warm_python()).with_name("socket"))
    for message in (b"", struct.pack("!Q", 1000) + b"{"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
            client.sendall(message)
    assert run_warm(("-c", "print(1)"), tmp_path, os.environ, 60).stdout == "1\n"


def test_a_program_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    program = start_warm(("-c", _WAITS), tmp_path, os.environ, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(timeout_s=0.1)
    assert program.wait(timeout_s=60).returncode == -signal.SIGKILL
    program.send(signal.SIGTERM)  # nothing happens
