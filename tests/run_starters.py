"""A starter of runs that starts none."""

from __future__ import annotations

from collections.abc import Sequence

from dreamartist_pipeline.starting_runs import RunOutcome, RunRequest, Workers


class Starter:
    """Notes what it is asked to start."""

    def __init__(self) -> None:
        self.requests: Sequence[RunRequest] = ()
        self.workers = Workers()

    def start(self, requests: Sequence[RunRequest], workers: Workers) -> tuple[RunOutcome, ...]:
        self.requests, self.workers = requests, workers
        return tuple(RunOutcome(one.subject, one.labels) for one in requests)
