"""Locks between processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from dreamartist_pipeline.locks import Holder, LocalLock, LockHeldError
from refusals import says

_HOLD = """
import sys, time
from pathlib import Path
from dreamartist_pipeline.locks import LocalLock
with LocalLock(Path(sys.argv[1]), "the subject fox").hold():
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _start_holder(file: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _HOLD, str(file), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = _start_holder(tmp_path / "fox" / ".lock", 60)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def lock(tmp_path: Path) -> LocalLock:
    return LocalLock(tmp_path / "fox" / ".lock", "the subject fox")


def test_held_lock_names_what_it_protects_and_who_holds_it_since_when(
    lock: LocalLock, other: subprocess.Popen[str]
) -> None:
    with pytest.raises(LockHeldError, check=says(expected="the subject fox")) as refused, lock.hold():
        pass
    holder = re.fullmatch(r".*process (\d+) since (\S+) \((.+)\)", refused.value.got)
    assert holder is not None
    assert int(holder[1]) == other.pid
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(holder[2])) < timedelta(minutes=5)
    assert str(lock.file) in holder[3]


def test_refused_run_leaves_the_holder_named(lock: LocalLock, other: subprocess.Popen[str]) -> None:
    for _ in range(2):
        with pytest.raises(LockHeldError, check=says(got=f"{other.pid}")), lock.hold():
            pass


def test_killed_process_holds_nothing(lock: LocalLock, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    with lock.hold(), pytest.raises(LockHeldError, check=says(got=f"{os.getpid()}")), lock.hold():
        pass


def test_stopped_process_still_holds_it(lock: LocalLock, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(LockHeldError), lock.hold():
        pass


def test_wait_ends_when_the_other_has_finished(
    tmp_path: Path, lock: LocalLock, caplog: pytest.LogCaptureFixture
) -> None:
    process = _start_holder(lock.file, 0.5)
    with caplog.at_level(logging.INFO), lock.hold(wait_s=60):
        assert process.wait() == 0
    assert f"{process.pid}" in caplog.text


def test_wait_is_bounded(lock: LocalLock, other: subprocess.Popen[str]) -> None:
    started_s = time.monotonic()
    with pytest.raises(LockHeldError), lock.hold(wait_s=0.3):
        pass
    assert 0.3 <= time.monotonic() - started_s < 5


def test_error_within_releases_it(lock: LocalLock) -> None:
    with pytest.raises(ZeroDivisionError), lock.hold():
        raise ZeroDivisionError
    with lock.hold():
        pass


def test_threads_exclude_each_other_too(lock: LocalLock) -> None:
    inside, largest = [], []

    def work() -> None:
        with lock.hold(wait_s=30):
            inside.append(1)
            largest.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert largest == [1] * 5


@pytest.mark.parametrize("text", ["", "nonsense", "{}", "[1]", '{"process": 1}'])
def test_damaged_description_still_refuses(lock: LocalLock, other: subprocess.Popen[str], text: str) -> None:
    lock.file.write_text(f" {text}")
    with pytest.raises(LockHeldError, check=says(got=".lock")), lock.hold():
        pass


def test_holder_on_another_machine_is_named_with_it() -> None:
    assert "on node-7" in str(Holder(12, "node-7", "2026-01-02T03:04:05+00:00", "kedro run"))
