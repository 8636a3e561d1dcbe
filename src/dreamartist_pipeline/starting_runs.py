"""Start runs of the project, several at a time.

`run_all` hands commands to an `Executor` (executors/): processes of this machine, or those of a Ray cluster. What a run
is, and whether it has been finished before, is known to a `RunStarter` (hooks/starting.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from dreamartist_pipeline.errors import InputError

RUN_KEY = "DREAMARTIST_RUN_KEY"
"""Environment variable of a started run: what its results depend on, as a hash. The manifest stores it."""
PARENT_RUN = "DREAMARTIST_PARENT_RUN"
"""Environment variable of a started run: the id of its parent in MLflow."""

STARTING = frozenset({"compare", "tune", "personalize", "sweep"})
"""The pipelines that start runs, and the sections of their parameters."""

_POLL_S = 0.5
_END_OF_LOG = 4_000  # bytes
_BAR = re.compile(rb"([A-Za-z][A-Za-z ]*): +(\d{1,3})%\|")  # of tqdm


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


@dataclass(frozen=True)
class Workers:
    """What executes runs.

    Attributes:
        count: how many run at a time; None for one, or on a cluster with GPUs, for one per GPU.
        threads: of each run; None for as many as it takes by itself.
        ray: address of a Ray cluster, or `local` for one on this machine; None for processes without Ray.
    """

    count: int | None = None
    threads: int | None = None
    ray: str | None = None


class RunSource(Protocol):
    """Runs that follow from what earlier ones have measured; its length is their number, if all are run."""

    def __len__(self) -> int:
        """Return how many runs there are at most."""

    def __iter__(self) -> Iterator[RunRequest]:
        """Yield the next run when a worker is free; runs have different subjects."""

    def examples(self) -> Sequence[RunRequest]:
        """Return runs with all values that may occur, which are checked before the first one is started."""

    def ended(self, result: RunResult) -> None:
        """Take the result of a run that has ended now, or had finished before."""


class RunStarter(Protocol):
    """Starts runs of this project."""

    def start(self, requests: Sequence[RunRequest] | RunSource, workers: Workers) -> tuple[RunOutcome, ...]:
        """Run what has not been finished before, and return the outcome of every request, in their order.

        Args:
            requests: runs with different subjects, or what yields them one by one.
            workers: what executes them.

        Raises:
            InputError: invalid parameters of a run; nothing is started.
            StoppedEarly: a signal; runs that have finished are kept.
        """

    def environment_of(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the parameters and the run settings of an environment for runs like one that was started.

        It has the values of the present environment, over these the parameters of such a run, and over these those of
        the command that starts it; nothing that names a subject.

        Args:
            params: of the run, nested.
        """


# ------------------------------------------------------------------------------------------------- how it is run


@dataclass(frozen=True)
class RunCommand:
    """A run as a command of the project.

    Attributes:
        name: of the run.
        arguments: of `kedro run`.
        folder: of the project.
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

    @property
    def num_workers(self) -> int:
        """How many commands it executes at a time."""

    def run(self, command: RunCommand) -> str | None:
        """Execute one command, wait for its end, and return the message of its error, or None.

        It is called by as many threads as commands run at a time.
        """

    def close(self) -> None:
        """Let commands that still run keep what they have done, and end them; later ones are not started."""


def progress_in(log: Path) -> str:
    """Return what a run does, and how much of it is done, by the last progress bar that it has printed; or nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_OF_LOG))
            bars = _BAR.findall(file.read())
    except OSError:
        return ""
    return "" if not bars else f"{bars[-1][0].decode()} {int(bars[-1][1])} %"


def run_all(
    commands: Iterable[RunCommand],
    executor: Executor,
    ended: Callable[[RunCommand, str | None], None],
    stop_requested: Callable[[], bool],
    watch: Callable[[Sequence[RunCommand]], None] = lambda _: None,
) -> None:
    """Execute commands, several at a time, in their order; one that fails does not end the others.

    Args:
        commands: with different names; the next one is asked for when a worker is free.
        executor: executes them; it is closed.
        ended: called in this thread with each command and its error, as it ends by itself.
        stop_requested: asked twice a second; if so, the running commands are stopped, and no other one is started.
        watch: called twice a second with the commands that run.
    """
    pool, source = ThreadPoolExecutor(executor.num_workers), iter(commands)
    running: dict[Future[str | None], RunCommand] = {}
    try:
        while not stop_requested():
            for command in islice(source, executor.num_workers - len(running)):
                running[pool.submit(executor.run, command)] = command
            watch([*running.values()])
            if not running:
                break
            done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.result()
                if error is None or not stop_requested():  # otherwise, the same signal may have ended it
                    ended(running.pop(future), error)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        executor.close()
        pool.shutdown()
