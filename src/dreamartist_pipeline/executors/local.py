"""Worker processes of this machine.

A worker (worker.py) executes one run after another, and keeps the libraries and the base model in memory in between.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from dreamartist_pipeline.starting_runs import RunCommand

PROGRAM = (sys.executable, "-m", "dreamartist_pipeline.worker")
ATTEMPTS = 3
"""How often a run is begun whose worker is lost: killed by the system, or with its machine."""
_GROWTH = 1.2  # of a worker's memory since its first run, after which it is replaced
_STOPPING_S = 120.0  # a training ends after its step, and saves its state
_END_OF_LOG = 20_000  # characters
_ERROR = re.compile(r"^Error: (.*?)(?=^\(--traceback|\Z)", re.DOTALL | re.MULTILINE)


class LocalWorkers:
    """Executes commands in worker processes of this machine, which end with this one.

    A command whose worker is killed is executed again by another one; trainings then go on from their last checkpoint.
    Workers stay in this process group: Ctrl-C in a terminal, and a signal to the group, reach them as well. When this
    process ends in any other way, their standard input does, too, and they stop.

    Args:
        count: how many commands are executed at a time.
        program: of a worker.
        stopping_s: how long commands that are stopped may take before they are killed.
    """

    def __init__(self, count: int = 1, program: tuple[str, ...] = PROGRAM, stopping_s: float = _STOPPING_S) -> None:
        self.num_workers = count
        self._program, self._stopping_s = program, stopping_s
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._is_closed = False

    def run(self, command: RunCommand) -> str | None:
        """Execute one command; see `Executor.run`."""
        command.log.parent.mkdir(parents=True, exist_ok=True)
        command.log.write_bytes(b"")
        for _ in range(ATTEMPTS):
            worker = self._take(command)
            if worker is None:
                return "not started"
            end = worker.execute(command)
            self._give_back(worker)
            if not end.is_lost:
                break
        return None if end.status == 0 and not end.is_lost else f"{_message(command, end)} ({command.log})"

    def close(self) -> None:
        """End all workers; runs stop as they do at SIGTERM, and those that do not are killed."""
        with self._lock:
            self._is_closed = True
            workers = [*self._idle, *self._busy]
            self._idle.clear()
        for worker in workers:
            worker.close()
        end_s = time.monotonic() + self._stopping_s
        for worker in workers:
            worker.wait(max(0.0, end_s - time.monotonic()))

    def _take(self, command: RunCommand) -> _Worker | None:
        with self._lock:
            if self._is_closed:
                return None
            worker = self._idle.pop() if self._idle else _Worker(self._program, command)
            self._busy.append(worker)
            return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.remove(worker)
            is_kept = not self._is_closed and worker.can_go_on
            if is_kept:
                self._idle.append(worker)
        if not is_kept:
            worker.close()
            worker.wait(self._stopping_s)


@dataclass(frozen=True)
class _End:
    """How a command has ended.

    Attributes:
        status: of its program, or of the worker if that has ended; negative for the signal that has killed it.
        memory_bytes: of the worker after it; None if the worker has ended.
    """

    status: int
    memory_bytes: int | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the worker has ended without an answer, by a signal or between two runs."""
        return self.memory_bytes is None and self.status <= 0


class _Worker:
    """A process that executes commands, one at a time; it has the environment of the first one."""

    def __init__(self, program: tuple[str, ...], first: RunCommand) -> None:
        variables: dict[str, str | None] = {**os.environ, **first.environment}
        with first.log.open("ab") as output:  # for what it prints before the first run
            self._process: subprocess.Popen[str] = subprocess.Popen(
                program,
                cwd=first.folder,
                env={name: value for name, value in variables.items() if value is not None},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                encoding="utf-8",
            )
        self._first_bytes: int | None = None
        self.can_go_on = True

    def execute(self, command: RunCommand) -> _End:
        """Execute a command and wait for its end."""
        request = {
            "arguments": command.arguments,
            "environment": dict(command.environment),
            "log": str(command.log),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except (OSError, ValueError):  # it has ended, or is being closed
            reply = ""
        if not reply:
            self.can_go_on = False
            return _End(self._process.wait())
        end = _End(**json.loads(reply))
        self._first_bytes = self._first_bytes or end.memory_bytes
        self.can_go_on = (end.memory_bytes or 0) <= _GROWTH * (self._first_bytes or 0)
        return end

    def close(self) -> None:
        """End its input, which stops what it executes and ends it."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:  # it has ended
            pass

    def wait(self, timeout_s: float) -> None:
        """Wait for its end, and kill it after the timeout."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _message(command: RunCommand, end: _End) -> str:
    """Return the message of the error that ended a run, from what it has printed."""
    text = command.log.read_text(encoding="utf-8", errors="replace")[-_END_OF_LOG:]
    if errors := _ERROR.findall(text):
        return str(errors[-1]).strip()
    if end.is_lost:
        by = f"was killed {ATTEMPTS} times by signal {-end.status}; the memory may be too small"
        return f"its process {by if end.status else f'has ended {ATTEMPTS} times without an answer'}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"exit status {end.status}" + (f": {lines[-1]}" if lines else "")
