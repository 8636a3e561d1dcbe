"""Several commands at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreamartist_pipeline.starting_runs import RunCommand, progress_in, run_all


def command(name: str) -> RunCommand:
    return RunCommand(name, (), Path(), {})


class Counting:
    """An executor that counts how many commands run at a time."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.now = self.most = 0
        self.order: list[str] = []
        self.closed = 0
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

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_commands_run_at_a_time_as_there_are_workers(workers: int) -> None:
    executor, names = Counting(workers), [f"run {index}" for index in range(6)]
    ended: list[str] = []
    run_all([command(name) for name in names], executor, lambda one, message: ended.append(one.name), lambda: False)
    assert executor.most == workers
    assert sorted(ended) == names
    assert workers > 1 or executor.order == names
    assert executor.closed == 1


def test_those_that_run_are_watched() -> None:
    watched: list[list[str]] = []
    run_all(
        [command(name) for name in "abc"],
        Counting(2),
        lambda one, message: None,
        lambda: False,
        lambda running: watched.append([one.name for one in running]),
    )
    assert watched[0] == ["a", "b"]
    assert "c" in watched[1]  # which begins when one of the others has ended
    assert watched[-1] == []
    assert max(map(len, watched)) <= 2


def test_a_command_is_asked_for_when_a_worker_is_free() -> None:
    ended: list[str] = []

    def commands() -> Iterator[RunCommand]:
        for index in range(4):
            assert len(ended) >= index - 1
            yield command(str(index))

    run_all(commands(), Counting(2), lambda one, message: ended.append(one.name), lambda: False)
    assert sorted(ended) == ["0", "1", "2", "3"]


def test_the_last_progress_bar_of_a_log_is_the_state_of_a_run(tmp_path: Path) -> None:
    log = tmp_path / "fox.log"
    assert progress_in(log) == ""
    log.write_text("INFO started\n")
    assert progress_in(log) == ""
    log.write_text("INFO\rregularization set:  50%|#  | 4/8\r\ntraining:   7%|# | 7/100 [00:01, loss=0.3]")
    assert progress_in(log) == "training 7 %"
