"""The trials of a sweep after their runs: scores, the best one, and its values as an environment."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from dreamartist_pipeline.core.halving import stopped_runs
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ParameterSearchParams
from dreamartist_pipeline.pipelines.compare.planning import SEARCH, SEED, SUBJECT, TRIAL, VALUES, rungs_of, trial_run
from dreamartist_pipeline.pipelines.compare.space import ParameterPath, dotted
from dreamartist_pipeline.starting_runs import RunResult, failure

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"


@dataclass(frozen=True)
class Trial:
    """Some values of the swept parameters, and what has become of them.

    Attributes:
        number: from 0.
        values: path of a parameter -> value.
        state: `FINISHED`, `STOPPED` or `FAILED`; None while it runs.
        score: the objective; NaN for a failed trial.
    """

    number: int
    values: Mapping[ParameterPath, Any] = field(hash=False)
    state: str | None = None
    score: float = math.nan

    def described(self) -> str:
        """Return the values in one line."""
        return ", ".join(f"{dotted(path)}={value}" for path, value in self.values.items())


def judged_trials(results: Sequence[RunResult], params: ParameterSearchParams) -> list[Trial]:
    """Return the trials of these runs, in the order of their numbers.

    Raises:
        InputError: a finished run does not have a metric of the objective.
    """
    folders = {rungs_of(params, one.outcome.labels[SEARCH]) for one in results}
    stopped = {run for rungs in folders for folder in rungs.glob("*") for run in stopped_runs(folder)}
    return [_judged(number, of_trial, params, stopped) for number, of_trial in sorted(_by_trial(results).items())]


def _by_trial(results: Sequence[RunResult]) -> dict[int, list[RunResult]]:
    runs: dict[int, list[RunResult]] = {}
    for one in results:
        runs.setdefault(one.outcome.labels[TRIAL], []).append(one)
    return runs


def _judged(number: int, runs: Sequence[RunResult], params: ParameterSearchParams, stopped: set[str]) -> Trial:
    values = {tuple(name.split(".")): value for name, value in runs[0].outcome.labels[VALUES].items()}
    if any(one.outcome.message is not None for one in runs):
        return Trial(number, values, FAILED)
    state = STOPPED if any(one.outcome.subject in stopped for one in runs) else FINISHED
    return Trial(number, values, state, _objective(runs, params))


def _objective(runs: Sequence[RunResult], params: ParameterSearchParams) -> float:
    """Return the weighted sum of the means over runs.

    Raises:
        InputError: a run has no such metric.
    """
    for metric in params.objective:
        if missing := [one for one in runs if metric not in one.metrics]:
            known = ", ".join(sorted(name for name in missing[0].metrics if not name.startswith("intervals/")))
            raise InputError(
                expected=f"metrics of evaluation_metrics.json in sweep.objective: {known}",
                got=metric,
                remedy="correct sweep.objective, and run the same command again: finished runs are not repeated",
            )
    return sum(weight * fmean(one.metrics[metric] for one in runs) for metric, weight in params.objective.items())


def best(trials: Sequence[Trial], results: Sequence[RunResult]) -> Trial:
    """Return the finished trial with the highest score; of equal ones, the first.

    Raises:
        InputError: none has finished.
    """
    finished = [one for one in trials if one.state == FINISHED]
    if not finished:
        if failed := [one.outcome for one in results if one.outcome.message is not None]:
            raise failure(failed, len(results))
        raise InputError(
            expected="a trial of which all trainings get to their end",
            got=f"{len(trials)} trials of which one was stopped early",
            remedy="raise sweep.halving.first, or lower sweep.halving.factor",
        )
    return max(finished, key=lambda one: one.score)


def as_records(
    trials: Sequence[Trial], results: Sequence[RunResult], params: ParameterSearchParams
) -> list[dict[str, Any]]:
    """Return one record per trial: finished ones from the best to the worst, then the others."""
    runs = _by_trial(results)

    def means(number: int) -> dict[str, float]:
        measured = [one.metrics for one in runs[number] if one.outcome.message is None]
        return {
            metric: fmean(metrics[metric] for metrics in measured) if measured else math.nan
            for metric in params.objective
        }

    order = sorted(trials, key=lambda one: (one.state != FINISHED, -one.score if one.score == one.score else math.inf))
    return [
        {
            "trial": one.number,
            "state": one.state,
            "score": one.score,
            **means(one.number),
            **{dotted(path): _as_cell(value) for path, value in one.values.items()},
            "message": next((run.outcome.message for run in runs[one.number] if run.outcome.message), None),
        }
        for one in order
    ]


def _as_cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def params_of_runs(trial: Trial, params: ParameterSearchParams) -> dict[str, Any]:
    """Return the parameters of the runs of a trial, without what stops them early, nested; the first seed is theirs."""
    labels = {SEARCH: "", TRIAL: trial.number, SUBJECT: params.subjects[0], SEED: params.seeds[0]}
    values = {dotted(path): value for path, value in trial.values.items()}
    whole = params.model_copy(update={"halving": None})
    return dict(trial_run(whole, {**labels, VALUES: values}).params)
