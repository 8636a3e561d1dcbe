"""The process that executes one run after another; its runs are in tests/integration/test_started_runs.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from warm_processes import warm_python

WORKER = ("-m", "dreamartist_pipeline.worker")


def start(folder: Path, program: tuple[str, ...] = WORKER) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (warm_python(), *program), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(worker: subprocess.Popen[str], log: Path, *arguments: str, **environment: str | None) -> None:
    assert worker.stdin is not None
    request = {"arguments": arguments, "environment": environment, "log": str(log)}
    print(json.dumps(request), file=worker.stdin, flush=True)


def answer(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    reply: dict[str, Any] = json.loads(worker.stdout.readline())
    return reply


def test_each_run_has_an_exit_status_and_a_log_of_its_own(tmp_path: Path) -> None:
    worker = start(tmp_path)
    for name, arguments, expected in (
        ("help", ["--help"], (0, "Usage: kedro run")),
        ("usage", ["--nosuch"], (2, "No such option")),
        ("error", ["--pipelines", "nosuch"], (1, "nosuch")),
    ):
        log = tmp_path / f"{name}.log"
        ask(worker, log, *arguments)
        reply = answer(worker)
        assert (reply["status"], expected[1] in log.read_text()) == (expected[0], True)
        assert reply["memory_bytes"] > 10**7
    worker.communicate(timeout=60)
    assert worker.returncode == 0


# The worker with another command than `kedro run`: its arguments are code.
_ANOTHER = """
import os, signal, time
from dreamartist_pipeline import __main__, worker
from dreamartist_pipeline.cli.stopping import stopped_by_signals

def run(arguments, prog_name):
    with stopped_by_signals() as stop:
        try:
            exec(compile(arguments[0], 'run', 'exec'))  # not of a text: its interruption would end the process
        except KeyboardInterrupt:
            print(stop.message, flush=True)
            raise SystemExit(130)
    raise SystemExit(0)

__main__.main = run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
worker.main()
"""
CODE_WORKER = ("-c", _ANOTHER)


def test_the_environment_of_a_run_is_that_of_no_other(tmp_path: Path) -> None:
    worker = start(tmp_path, CODE_WORKER)
    ask(worker, tmp_path / "a", "print(os.environ['GIVEN']); os.environ['MADE'] = '1'", GIVEN="yes", HOME=None)
    ask(worker, tmp_path / "b", "print(os.environ.get('GIVEN'), os.environ.get('MADE'), 'HOME' in os.environ)")
    assert [answer(worker)["status"], answer(worker)["status"]] == [0, 0]
    worker.communicate(timeout=60)
    assert [(tmp_path / name).read_text().strip() for name in "ab"] == ["yes", f"None None {'HOME' in os.environ}"]


def test_an_unexpected_error_ends_its_run_only(tmp_path: Path) -> None:
    worker = start(tmp_path, CODE_WORKER)
    ask(worker, tmp_path / "a", "1 / 0")
    ask(worker, tmp_path / "b", "print('fine')")
    assert [answer(worker)["status"], answer(worker)["status"]] == [1, 0]
    worker.communicate(timeout=60)
    assert "ZeroDivisionError" in (tmp_path / "a").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="a signal does not end a call of the system")
@pytest.mark.parametrize("is_busy", [True, False])
def test_the_end_of_its_input_ends_it(tmp_path: Path, is_busy: bool) -> None:
    worker = start(tmp_path, CODE_WORKER)
    ask(worker, tmp_path / "log", "open('begun', 'w').close(); time.sleep(60 if " + str(is_busy) + " else 0)")
    end_s = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < end_s:
        time.sleep(0.01)
    if not is_busy:
        assert answer(worker)["status"] == 0
    output, _ = worker.communicate(timeout=60)
    if is_busy:
        assert json.loads(output)["status"] == 130
        assert "Stopped by SIGTERM" in (tmp_path / "log").read_text()
    assert worker.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a process of its own")
def test_ctrl_c_between_two_runs_ends_it_without_a_traceback(tmp_path: Path) -> None:
    worker = subprocess.Popen(
        (warm_python(), *CODE_WORKER),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ask(worker, tmp_path / "log", "pass")
    answer(worker)
    worker.send_signal(signal.SIGINT)
    assert worker.wait(60) == 0
    assert worker.stderr is not None and worker.stderr.read() == ""
