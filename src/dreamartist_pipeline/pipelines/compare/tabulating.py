"""The table of a comparison: a row per method, with intervals over subjects and seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch

from dreamartist_pipeline.core.intervals import Estimate, bootstrap_grid
from dreamartist_pipeline.core.measures import MEASURES, Measure
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import CompareParams
from dreamartist_pipeline.pipelines.compare.planning import METHOD, SEED, SUBJECT
from dreamartist_pipeline.starting_runs import RunOutcome, RunResult, failure

CONCEPT, BASE, CEILING = "concept", "base", "ceiling"  # groups of an evaluation
TITLES = {BASE: "base model, class word", CEILING: "autoencoder's reconstruction (ceiling)"}
STEP_SECONDS, TRAINING_SECONDS = "seconds per step", "training, s"
UNKNOWN = Estimate(math.nan, math.nan, math.nan)

_GROUP = re.compile(rf"(?<=[./]){CONCEPT}(?=\.|$)")
_SAME = (
    5e-3  # of the base model's metrics in runs of several methods; a GPU may choose other algorithms in each process
)


def measure_of(metric: str) -> Measure | None:
    """Return the measure that a metric such as "similarity/concept.dinov2" is an estimate of; None for others."""
    named = [one for one in MEASURES if re.match(rf"{re.escape(one.name)}[./]", metric)]
    return max(named, key=lambda one: len(one.name), default=None)


def title_of(metric: str) -> str:
    """Return the title of a metric, with the model that measures."""
    measure = measure_of(metric)
    if measure is None:
        return metric
    by = _GROUP.sub("", metric.removeprefix(measure.name)).strip("./")
    return f"{measure.title} ({by})" if by else measure.title


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
        params: what is compared.
        results: of all runs.
    """

    params: CompareParams
    results: Sequence[RunResult]

    @cached_property
    def _by_labels(self) -> Mapping[tuple[str, str, int], RunResult]:
        labels = [(one, one.outcome.labels) for one in self.results if one.outcome.message is None]
        return {(of[METHOD], of[SUBJECT], of[SEED]): one for one, of in labels}

    @property
    def failed(self) -> list[RunOutcome]:
        """The runs that failed."""
        return [one.outcome for one in self.results if one.outcome.message is not None]

    @cached_property
    def subjects(self) -> list[str]:
        """The subjects of which all runs have finished: methods are compared on the same subjects."""
        params = self.params
        return [
            subject
            for subject in params.subjects
            if all((row, subject, seed) in self._by_labels for row in params.rows for seed in params.seeds)
        ]

    def check(self) -> None:
        """Check that there is something to compare.

        Raises:
            InputError: no subject is complete, no run has a metric of the plots, or the base model's images differ
                between the methods of a subject.
        """
        if not self.subjects:
            raise failure(self.failed, len(self.results))
        check_metrics(self.params.measures.model_dump().values(), self.results, "compare.measures")
        self._check_same_base()

    def _check_same_base(self) -> None:
        metric = in_group(self.params.measures.fidelity, BASE)
        if metric == self.params.measures.fidelity:
            return
        for subject in self.subjects:
            values = {row: float(self._grid(row, metric, [subject]).nanmean()) for row in self.params.rows}
            if max(values.values()) - min(values.values()) > _SAME:
                listed = ", ".join(f"{row} {value:.6f}" for row, value in values.items())
                raise InputError(
                    expected=f"the same images of the base model in all runs of {subject}",
                    got=f"{metric}: {listed}",
                    remedy=f"delete data/06_models/{subject}-*, and run the same command again",
                )

    def _grid(self, row: str, metric: str, subjects: Sequence[str]) -> torch.Tensor:
        """Return the values of a method, float64 `[subjects, seeds]`; NaN where a run has no such metric."""
        values = [
            [_value(self._by_labels[row, subject, seed], metric) for seed in self.params.seeds] for subject in subjects
        ]
        return torch.tensor(values, dtype=torch.float64)

    def estimate(self, row: str, metric: str) -> Estimate:
        """Return the mean of a method, with its 95 % interval over subjects and seeds."""
        return _estimate(self._grid(row, metric, self.subjects))

    def difference(self, row: str, metric: str) -> Estimate:
        """Return the mean of a method minus that of the reference method, by pairs of the same subject and seed."""
        pairs = [self._grid(one, metric, self.subjects) for one in (row, self.params.reference)]
        return _estimate(pairs[0] - pairs[1])

    def of_group(self, group: str, metric: str) -> Estimate:
        """Return the mean of the base model or the ceiling, which all methods share."""
        name, measure = in_group(metric, group), measure_of(metric)
        if name != metric and not math.isnan((shared := self.estimate(next(iter(self.params.rows)), name)).mean):
            return shared
        value = math.nan if measure is None else measure.by_definition.get(group, math.nan)
        return Estimate(value, math.nan, math.nan)


def in_group(metric: str, group: str) -> str:
    """Return the name of a concept's metric for the base model or the ceiling; metrics without a group stay."""
    return _GROUP.sub(group, metric)


def _value(result: RunResult, metric: str) -> float:
    if metric == STEP_SECONDS:
        return median(result.step_seconds) if result.step_seconds else math.nan
    if metric == TRAINING_SECONDS:
        return sum(result.step_seconds)
    return result.metrics.get(metric, math.nan)


def _estimate(values: torch.Tensor) -> Estimate:
    return UNKNOWN if bool(values.isnan().all()) else bootstrap_grid(values)


def check_metrics(metrics: Iterable[str], results: Sequence[RunResult], option: str) -> None:
    """Check that runs have metrics; those of one run may be missing.

    Args:
        metrics: their names.
        results: of all runs.
        option: that names the metrics.

    Raises:
        InputError: no run has one of them.
    """
    known = {name for one in results for name in one.metrics}
    if missing := [metric for metric in metrics if metric not in known]:
        listed = ", ".join(sorted(name for name in known if "interval" not in name))
        raise InputError(
            expected=f"a metric of these runs in {option}, out of {listed}",
            got=", ".join(missing),
            remedy="correct it",
        )


# ------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of the method, or of the group of an evaluation.
        title: for readers.
        estimates: metric -> its estimate.
        differences: metric of the plots -> difference from the reference method; empty for others than methods.
    """

    name: str
    title: str
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]

    @property
    def is_method(self) -> bool:
        """Whether it is a method."""
        return self.name not in TITLES


def tabulate(comparison: Comparison) -> list[Row]:
    """Return the rows: the base model, every method, and the ceiling."""
    params = comparison.params
    plotted = params.measures.model_dump().values()
    metrics = list(dict.fromkeys((*plotted, *params.columns)))
    rows = [
        Row(
            name,
            method.title,
            {metric: comparison.estimate(name, metric) for metric in (*metrics, STEP_SECONDS, TRAINING_SECONDS)},
            {metric: comparison.difference(name, metric) for metric in plotted}
            if params.reference in params.rows
            else {},
        )
        for name, method in params.rows.items()
    ]
    base, ceiling = (
        Row(group, title, {metric: comparison.of_group(group, metric) for metric in metrics}, {})
        for group, title in TITLES.items()
    )
    return [base, *rows, ceiling]


def front(rows: Sequence[Row], gains: Sequence[tuple[str, int]]) -> list[str]:
    """Return the names of the methods that no other one dominates (the Pareto front).

    A method dominates another one if it is at least as good in both measures and better in one of them.

    Args:
        rows: of the table.
        gains: two metrics, each with 1 if higher is better, or -1.
    """
    points = {
        row.name: tuple(sign * row.estimates[metric].mean for metric, sign in gains)
        for row in rows
        if row.is_method and not any(math.isnan(row.estimates[metric].mean) for metric, _ in gains)
    }
    return [
        name
        for name, point in points.items()
        if not any(
            other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in points.values()
        )
    ]
