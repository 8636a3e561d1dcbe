"""A starter of runs that starts none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dreamartist_pipeline.params import RUN_SETTINGS
from dreamartist_pipeline.starting_runs import RunOutcome, RunRequest, RunSource, Workers
from dreamartist_pipeline.yaml_texts import merge_mappings


class Starter:
    """Notes what it is asked to start."""

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self.given = given or {}
        self.requests: Sequence[RunRequest] = ()
        self.workers = Workers()

    def start(self, requests: Sequence[RunRequest] | RunSource, workers: Workers) -> tuple[RunOutcome, ...]:
        self.requests, self.workers = tuple(requests), workers
        return tuple(RunOutcome(one.subject, one.labels) for one in self.requests)

    def environment_of(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        values = merge_mappings(params, self.given)
        settings = {name: value for name, value in values.items() if name in RUN_SETTINGS}
        return {name: value for name, value in values.items() if name not in settings}, settings
