"""The choice of one setting per method from the runs of a tuning."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from dreamartist_pipeline.params import TuneParams
from dreamartist_pipeline.pipelines.compare.planning import METHOD, SETTING
from dreamartist_pipeline.pipelines.compare.tabulating import check_metrics
from dreamartist_pipeline.starting_runs import RunResult, failure


@dataclass(frozen=True)
class Tried:
    """A setting of a method, and what its runs have measured.

    Attributes:
        method: name of its row in the comparison.
        index: of the setting.
        means: metric of the objective -> mean over the runs; NaN if one of them has failed, or has no such metric.
        step_seconds: median over the steps of the fastest run, because other programs only slow down; NaN without one.
    """

    method: str
    index: int
    means: dict[str, float]
    step_seconds: float


def check_objective(results: Sequence[RunResult], tuning: TuneParams) -> None:
    """Check that there is something to choose from.

    Raises:
        InputError: all runs failed, or none has a metric of the objective.
    """
    failed = [one.outcome for one in results if one.outcome.message is not None]
    if len(failed) == len(results):
        raise failure(failed, len(results))
    check_metrics(tuning.objective, results, "tune.objective")


def tried_settings(results: Sequence[RunResult], tuning: TuneParams) -> list[Tried]:
    """Return every setting of the methods in these runs."""
    runs: dict[tuple[str, int], list[RunResult]] = {}
    for one in results:
        runs.setdefault((one.outcome.labels[METHOD], one.outcome.labels[SETTING]), []).append(one)
    return [
        Tried(
            method,
            index,
            {metric: fmean(one.metrics.get(metric, math.nan) for one in of_setting) for metric in tuning.objective},
            min((median(one.step_seconds) for one in of_setting if one.step_seconds), default=math.nan),
        )
        for (method, index), of_setting in runs.items()
    ]


def score(tried: Tried, tuning: TuneParams) -> float:
    """Return the weighted sum of the means."""
    return sum(weight * tried.means[metric] for metric, weight in tuning.objective.items())


def step_cost(tried: Tried, settings: Sequence[Tried]) -> float:
    """Return the duration of a step as a multiple of that of the method's first setting."""
    first = next(one for one in settings if one.method == tried.method and one.index == 0)
    return tried.step_seconds / first.step_seconds


def choose(settings: Sequence[Tried], tuning: TuneParams) -> dict[str, int]:
    """Return method -> index of the setting with the highest score among those that are not too slow.

    Of equal scores, the first one. Methods of which no setting has a score are left out.
    """
    chosen: dict[str, Tried] = {}
    for one in settings:
        if math.isnan(score(one, tuning)) or not step_cost(one, settings) <= tuning.max_step_cost:
            continue
        best = chosen.get(one.method)
        if best is None or score(one, tuning) > score(best, tuning):
            chosen[one.method] = one
    return {method: one.index for method, one in chosen.items()}


def as_records(settings: Sequence[Tried], chosen: dict[str, int], tuning: TuneParams) -> list[dict[str, Any]]:
    """Return one record per setting."""
    return [
        {
            "method": one.method,
            "setting": one.index,
            "chosen": chosen.get(one.method) == one.index,
            "score": score(one, tuning),
            **one.means,
            "seconds per step": one.step_seconds,
            "cost of a step": step_cost(one, settings),
            "params": json.dumps(tuning.settings[one.method][one.index]),
        }
        for one in settings
    ]


def overlay(chosen: dict[str, int], tuning: TuneParams) -> dict[str, Any]:
    """Return the parameters of an environment in which `compare` has the chosen settings."""
    methods = {method: {"params": tuning.settings[method][index]} for method, index in chosen.items()}
    return {"compare": {"methods": methods}}
