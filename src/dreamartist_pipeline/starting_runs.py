"""Start runs of the project, several at a time, each in a process of its own.

`run_all` hands commands to an `Executor`; processes of this machine are one, and a cluster's workers can be another.
What a run is, and whether it has been finished before, is known to a `RunStarter` (hooks/starting.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dreamartist_pipeline.errors import InputError

RUN_KEY = "DREAMARTIST_RUN_KEY"
"""Environment variable of a started run: what its results depend on, as a hash. The manifest stores it."""
PARENT_RUN = "DREAMARTIST_PARENT_RUN"
"""Environment variable of a started run: the id of its parent in MLflow."""
ENDS_WITH_INPUT = "DREAMARTIST_ENDS_WITH_INPUT"
"""Environment variable of a started run: its standard input ends when the process that has started it does."""

_POLL_S = 0.5
_STOPPING_S = 120.0  # a training ends after its step, and saves its state
_END_OF_LOG = 20_000  # characters
_ERROR = re.compile(r"^Error: (.*?)(?=^\(--traceback|\Z)", re.DOTALL | re.MULTILINE)


# ------------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class RunRequest:
    """A run to start, unless it has finished before.

    Attributes:
        subject: names its folders.
        pipelines: that it runs.
        params: its run settings and sections, nested, as in `--params`.
        labels: what it is to those who have asked for it, such as its method.
        results: datasets that are needed of it: a run that has finished before is repeated without them.
    """

    subject: str
    pipelines: tuple[str, ...]
    params: Mapping[str, Any] = field(hash=False)
    labels: Mapping[str, Any] = field(default_factory=dict, hash=False)
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunOutcome:
    """How a run has ended.

    Attributes:
        subject: of the run.
        labels: of its request.
        message: of its error; None if it has finished.
    """

    subject: str
    labels: Mapping[str, Any] = field(default_factory=dict, hash=False)
    message: str | None = None


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run, and what it has measured; without measures if it has failed.

    Attributes:
        outcome: how it has ended.
        metrics: of its evaluation.
        step_seconds: duration of each training step.
        picture: reads the picture that shows its results, such as the contact sheet; None if it is not asked for.
    """

    outcome: RunOutcome
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    step_seconds: tuple[float, ...] = ()
    picture: Callable[[], Any] | None = field(default=None, hash=False, compare=False)


def failure(failed: Sequence[RunOutcome], num_runs: int) -> InputError:
    """Return the error that lists the runs that failed."""
    listed = "".join(f"\n  {one.subject}: {one.message}" for one in failed)
    return InputError(
        expected=f"all {num_runs} runs to finish",
        got=f"{len(failed)} that failed:{listed}",
        remedy="correct what they say, and run the same command again: finished runs are not repeated",
    )


def report_failures(results: Sequence[RunResult], _report: object) -> None:
    """End the run with an error if one of its runs has failed, after the others are in the report; a node.

    Raises:
        InputError: the message lists them.
    """
    if failed := [one.outcome for one in results if one.outcome.message is not None]:
        raise failure(failed, len(results))


class RunStarter(Protocol):
    """Starts runs of this project."""

    def start(self, requests: Sequence[RunRequest], workers: int, threads: int | None) -> tuple[RunOutcome, ...]:
        """Run what has not been finished before, and return the outcome of every request, in their order.

        Args:
            requests: runs with different subjects.
            workers: how many run at a time.
            threads: of each run; None for as many as it takes by itself.

        Raises:
            InputError: invalid parameters of a run; nothing is started.
            StoppedEarly: a signal; runs that have finished are kept.
        """


# ------------------------------------------------------------------------------------------------- how it is run


@dataclass(frozen=True)
class RunCommand:
    """A run as a program.

    Attributes:
        name: of the run.
        arguments: the program and its arguments.
        folder: its working directory.
        environment: variables that differ from those of this process; None for one that it has not.
        log: file for all that it prints.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str | None] = field(hash=False)
    log: Path = Path(os.devnull)


class Executor(Protocol):
    """Where commands are executed."""

    def run(self, command: RunCommand) -> str | None:
        """Execute one command, wait for its end, and return the message of its error, or None.

        It is called by as many threads as commands run at a time.
        """

    def stop(self) -> None:
        """Let all commands keep what they have done, and end them; later ones are not started."""


class LocalProcesses:
    """Executes commands in processes of this machine, which end with this one.

    They stay in its process group: Ctrl-C in a terminal, and a signal to the group, reach them as well. When this
    process ends in any other way, their standard input does, too; see `cli.stopping`.

    Args:
        stopping_s: how long commands that are stopped may take before they are killed.
    """

    def __init__(self, stopping_s: float = _STOPPING_S) -> None:
        self._stopping_s = stopping_s
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._is_stopped = False

    def run(self, command: RunCommand) -> str | None:
        """Execute one command; see `Executor.run`."""
        command.log.parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, **command.environment, ENDS_WITH_INPUT: "1"}
        with command.log.open("wb") as output:
            with self._lock:
                if self._is_stopped:
                    return "not started"
                process = self._running[command.name] = subprocess.Popen(
                    command.arguments,
                    cwd=command.folder,
                    env={name: value for name, value in variables.items() if value is not None},
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            status = process.wait()
        with self._lock:
            del self._running[command.name]
        _close_input(process)
        return None if status == 0 else f"{_message_in(command.log, status)} ({command.log})"

    def stop(self) -> None:
        """Send SIGTERM to all processes, which background jobs do not ignore, and kill those that do not end."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running.values())
        for process in running:
            process.terminate()
        end_s = time.monotonic() + self._stopping_s
        for process in running:
            try:
                process.wait(max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _close_input(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _message_in(file: Path, status: int) -> str:
    """Return the message of the error that ended a run, from what it has printed."""
    text = file.read_text(encoding="utf-8", errors="replace")[-_END_OF_LOG:]
    if errors := _ERROR.findall(text):
        return str(errors[-1]).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"exit status {status}" + (f": {lines[-1]}" if lines else "")


def run_all(
    commands: Sequence[RunCommand],
    executor: Executor,
    workers: int,
    ended: Callable[[RunCommand, str | None], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Execute commands, `workers` at a time, in their order; one that fails does not end the others.

    Args:
        commands: with different names.
        executor: executes them.
        workers: at least 1.
        ended: called in this thread with each command and its error, as it ends by itself.
        stop_requested: asked twice a second; if so, the running commands are stopped, and no other one is started.
    """
    pool = ThreadPoolExecutor(workers)
    waiting: dict[Future[str | None], RunCommand] = {pool.submit(executor.run, one): one for one in commands}
    try:
        while waiting and not stop_requested():
            done, _ = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.result()
                if error is None or not stop_requested():  # otherwise, the same signal may have ended it
                    ended(waiting.pop(future), error)
    finally:
        if waiting:
            pool.shutdown(wait=False, cancel_futures=True)
            executor.stop()
        pool.shutdown()
