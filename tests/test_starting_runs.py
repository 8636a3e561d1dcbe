"""Commands in processes of their own: several at a time, failures, and what stops them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dreamartist_pipeline.starting_runs import LocalProcesses, RunCommand, run_all


def command(folder: Path, name: str, code: str, **environment: str | None) -> RunCommand:
    arguments = (sys.executable, "-c", code)
    return RunCommand(name, arguments, folder, environment, folder / "logs" / f"{name}.log")


def ends(commands: list[RunCommand], workers: int = 1) -> dict[str, str | None]:
    """Run commands, and return the message of each."""
    found: dict[str, str | None] = {}

    def ended(command: RunCommand, message: str | None) -> None:
        found[command.name] = message

    run_all(commands, LocalProcesses(), workers, ended, lambda: False)
    return found


def test_a_failed_command_is_reported_by_its_message_and_the_others_finish(tmp_path: Path) -> None:
    error = "print('Error: expected a picture;\\ngot none\\n(--traceback shows where)'); raise SystemExit(1)"
    found = ends(
        [
            command(tmp_path, "wrong", error),
            command(tmp_path, "crash", "import os; print('last words', flush=True); os._exit(7)"),
            command(tmp_path, "silent", "raise SystemExit(3)"),
            command(tmp_path, "right", "open('made', 'w').write('x')"),
        ]
    )
    log = tmp_path / "logs"
    assert found == {
        "wrong": f"expected a picture;\ngot none ({log / 'wrong.log'})",
        "crash": f"exit status 7: last words ({log / 'crash.log'})",
        "silent": f"exit status 3 ({log / 'silent.log'})",
        "right": None,
    }
    assert (tmp_path / "made").read_text() == "x"


def test_a_command_has_its_own_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GONE", "1")
    code = "import os; print(os.environ['ADDED'], os.environ.get('GONE'), os.getcwd())"
    assert ends([command(tmp_path, "one", code, ADDED="yes", GONE=None)]) == {"one": None}
    assert (tmp_path / "logs/one.log").read_text().strip() == f"yes None {tmp_path}"


class Counting:
    """An executor that counts how many commands run at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.order: list[str] = []
        self.lock = threading.Lock()

    def run(self, command: RunCommand) -> str | None:
        with self.lock:
            self.order.append(command.name)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
        return None

    def stop(self) -> None:
        raise AssertionError("nothing was interrupted")


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_commands_run_at_a_time_as_there_are_workers(tmp_path: Path, workers: int) -> None:
    executor, names = Counting(), [f"run {index}" for index in range(6)]
    ended: list[str] = []
    commands = [command(tmp_path, name, "") for name in names]
    run_all(commands, executor, workers, lambda one, message: ended.append(one.name), lambda: False)
    assert executor.most == workers
    assert sorted(ended) == names
    assert workers > 1 or executor.order == names


_WAITS = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (Path(sys.argv[1] + '.kept').touch(), sys.exit(130)))
Path(sys.argv[1]).touch()
time.sleep(60)
"""


def waiting(folder: Path, name: str, code: str = _WAITS) -> RunCommand:
    return RunCommand(name, (sys.executable, "-c", code, name), folder, {}, folder / f"{name}.log")


def stopped(folder: Path, commands: list[RunCommand], executor: LocalProcesses) -> list[str]:
    """Run commands, one at a time, until the first one has made its file; return the names of those that have ended."""
    ended: list[str] = []
    has_begun = (folder / commands[0].name).exists
    run_all(commands, executor, 1, lambda one, message: ended.append(one.name), has_begun)
    return ended


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process of Windows at once")
def test_commands_that_are_stopped_keep_their_work_and_no_other_is_started(tmp_path: Path) -> None:
    assert stopped(tmp_path, [waiting(tmp_path, "a"), waiting(tmp_path, "b")], LocalProcesses()) == []
    assert (tmp_path / "a.kept").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process of Windows at once")
def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    code = _WAITS.replace("sys.exit(130)", "None").replace("time.sleep(60)", "[time.sleep(1) for _ in range(60)]")
    start_s = time.monotonic()
    assert stopped(tmp_path, [waiting(tmp_path, "a", code)], LocalProcesses(stopping_s=0.2)) == []
    assert time.monotonic() - start_s < 30
    assert (tmp_path / "a.kept").exists()


_STARTS = """
import os, sys, threading, time
from pathlib import Path
from dreamartist_pipeline.starting_runs import LocalProcesses, RunCommand
child = "import os; open('begun', 'w').close(); os.read(0, 1); open('ended', 'w').close()"
command = RunCommand("a", (sys.executable, "-c", child), Path(sys.argv[1]), {})
threading.Thread(target=LocalProcesses().run, args=[command]).start()
while not Path(sys.argv[1], "begun").exists():
    time.sleep(0.01)
os._exit(0)
"""


def test_the_input_of_a_command_ends_with_the_process_that_has_started_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _STARTS, str(tmp_path)], check=True, timeout=60)
    end_s = time.monotonic() + 60
    while not (tmp_path / "ended").exists() and time.monotonic() < end_s:
        time.sleep(0.01)
    assert (tmp_path / "ended").exists()
