"""Worker processes of this machine: failures, lost workers, growing ones, and what stops them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from code_workers import CODE_WORKER, code_command, ends_of, waiting
from dreamartist_pipeline.executors.local import LocalWorkers
from dreamartist_pipeline.starting_runs import RunCommand, run_all


def local(stopping_s: float = 60.0) -> LocalWorkers:
    return LocalWorkers(1, CODE_WORKER, stopping_s)


def test_a_failed_command_is_reported_by_its_message_and_the_others_finish(tmp_path: Path) -> None:
    error = "print('Error: expected a picture;\\ngot none\\n(--traceback shows where)', file=log); raise SystemExit(1)"
    found = ends_of(
        [
            code_command(tmp_path, "wrong", error),
            code_command(tmp_path, "crash", "import os; print('last words', file=log, flush=True); os._exit(7)"),
            code_command(tmp_path, "silent", "raise SystemExit(3)"),
            code_command(tmp_path, "right", "open('made', 'w').write('x')"),
        ],
        local(),
    )
    log = tmp_path / "logs"
    assert found == {
        "wrong": f"expected a picture;\ngot none ({log / 'wrong.log'})",
        "crash": f"exit status 7: last words ({log / 'crash.log'})",
        "silent": f"exit status 3 ({log / 'silent.log'})",
        "right": None,
    }
    assert (tmp_path / "made").read_text() == "x"


_WRITES_PID = "import os; open('pids', 'a').write(f'{os.getpid()}\\n')"


def pids(folder: Path) -> list[str]:
    return (folder / "pids").read_text().split()


def test_a_worker_executes_one_command_after_another(tmp_path: Path) -> None:
    assert ends_of([code_command(tmp_path, name, _WRITES_PID) for name in "abc"], local()) == dict.fromkeys("abc")
    assert len(pids(tmp_path)) == 3
    assert len({*pids(tmp_path)}) == 1


def test_a_worker_whose_memory_has_grown_by_a_fifth_is_replaced(tmp_path: Path) -> None:
    codes = {"a": 100, "b": 120, "c": 121, "d": 100}
    commands = [
        code_command(tmp_path, name, f"{_WRITES_PID}; worker.memory_bytes = {memory}") for name, memory in codes.items()
    ]
    ends_of(commands, local())
    first, second, third, fourth = pids(tmp_path)
    assert first == second == third != fourth


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_command_whose_worker_is_killed_is_executed_again_by_another(tmp_path: Path) -> None:
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    once = f"{_WRITES_PID}\nif len(open('pids').readlines()) == 1: {dies}"
    assert ends_of([code_command(tmp_path, "once", once)], local()) == {"once": None}
    assert len({*pids(tmp_path)}) == 2
    message = ends_of([code_command(tmp_path, "always", dies)], local())["always"]
    assert message is not None
    assert "killed 3 times by signal 9" in message


def test_a_worker_that_ends_without_an_answer_has_not_finished_its_command(tmp_path: Path) -> None:
    message = ends_of([code_command(tmp_path, "a", "import os; os._exit(0)")], local())["a"]
    assert message is not None
    assert "3 times without an answer" in message


def test_a_command_has_its_own_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GONE", "1")
    code = "import os; print(os.environ['ADDED'], os.environ.get('GONE'), os.getcwd(), file=log)"
    assert ends_of([code_command(tmp_path, "one", code, ADDED="yes", GONE=None)], local()) == {"one": None}
    assert (tmp_path / "logs/one.log").read_text().strip() == f"yes None {tmp_path}"


def stopped(commands: list[RunCommand], executor: LocalWorkers) -> list[str]:
    """Run commands, one at a time, until the first one has made its file; return the names of those that have ended."""
    ended: list[str] = []
    has_begun = (commands[0].folder / commands[0].name).exists
    run_all(commands, executor, lambda one, message: ended.append(one.name), has_begun)
    return ended


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process of Windows at once")
def test_commands_that_are_stopped_keep_their_work_and_no_other_is_started(tmp_path: Path) -> None:
    assert stopped([waiting(tmp_path, "a"), waiting(tmp_path, "b")], local()) == []
    assert (tmp_path / "a.kept").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process of Windows at once")
def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    start_s = time.monotonic()
    assert stopped([waiting(tmp_path, "a", "None")], local(0.5)) == []
    assert time.monotonic() - start_s < 30
    assert (tmp_path / "a.kept").exists()


_STARTS = """
import os, sys, threading, time
from pathlib import Path
from dreamartist_pipeline.executors.local import LocalWorkers
from dreamartist_pipeline.starting_runs import RunCommand
folder, code, *program = sys.argv[1:]
command = RunCommand("a", (code,), Path(folder), {})
threading.Thread(target=LocalWorkers(1, tuple(program)).run, args=[command]).start()
while not Path(folder, "a").exists():
    time.sleep(0.01)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process of Windows at once")
def test_a_worker_stops_with_the_process_that_has_started_it(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _STARTS, str(tmp_path), waiting(tmp_path, "a").arguments[0], *CODE_WORKER]
    subprocess.run(arguments, check=True, timeout=60)
    end_s = time.monotonic() + 60
    while not (tmp_path / "a.kept").exists() and time.monotonic() < end_s:
        time.sleep(0.01)
    assert (tmp_path / "a.kept").exists()
