"""The table of a comparison as columns of a CSV file, and as a report in markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dreamartist_pipeline.core.intervals import Estimate
from dreamartist_pipeline.pipelines.compare.tabulating import (
    STEP_SECONDS,
    TRAINING_SECONDS,
    Comparison,
    Row,
    measure_of,
    title_of,
)

_DURATIONS = {STEP_SECONDS: ".3f", TRAINING_SECONDS: ".0f"}


def as_records(rows: Sequence[Row], fronts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return one record per row: every estimate with its ends, and the plots on whose front the method is."""
    return [
        {
            "row": row.name,
            "title": row.title,
            **{name: row.name in names for name, names in fronts.items()},
            **_flat(row.estimates, ""),
            **_flat(row.differences, "difference "),
        }
        for row in rows
    ]


def _flat(estimates: Mapping[str, Estimate], prefix: str) -> dict[str, float]:
    return {
        f"{prefix}{metric}{end}": getattr(estimate, part)
        for metric, estimate in estimates.items()
        for end, part in (("", "mean"), (" low", "low"), (" high", "high"))
    }


def to_markdown(comparison: Comparison, rows: Sequence[Row], fronts: Mapping[str, Sequence[str]]) -> str:
    """Return the report: what was compared, the table, paired differences, the fronts, and what is missing."""
    return "\n\n".join(_sections(comparison, rows, fronts)) + "\n"


def _sections(comparison: Comparison, rows: Sequence[Row], fronts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    params = comparison.params
    seeds = ", ".join(map(str, params.seeds))
    yield "# Comparison of methods"
    yield (
        f"{_count(len(params.rows), 'method')} on {_count(len(comparison.subjects), 'subject')} "
        f"({', '.join(comparison.subjects)}), {_count(len(params.seeds), 'seed')} of the training ({seeds}). Means "
        "over subjects and seeds, with 95 % intervals of a bootstrap that resamples both independently."
    )
    metrics = [*params.columns, STEP_SECONDS, TRAINING_SECONDS]
    yield _table([(row.title, row.estimates) for row in rows], metrics, signed=False)
    if others := [(row.title, row.differences) for row in rows if row.differences and row.name != params.reference]:
        yield f"Difference from {params.methods[params.reference].title}, of the same subjects and seeds:"
        yield _table(others, list(dict.fromkeys(params.measures.model_dump().values())), signed=True)
    for name, names in fronts.items():
        yield f"Not dominated in {name}: {'; '.join(params.methods[one].title for one in names)}."
    if comparison.failed:
        listed = [f"* {one.subject}: {one.message}" for one in comparison.failed]
        yield "\n".join(["Not in the tables, with all runs of the same subject, because a run failed:", "", *listed])


def _table(rows: Sequence[tuple[str, Mapping[str, Estimate]]], metrics: Sequence[str], signed: bool) -> str:
    header = ["", *map(title_of, metrics)]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * len(metrics)]
    for title, estimates in rows:
        cells = [_cell(metric, estimates.get(metric), signed) for metric in metrics]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(metric: str, estimate: Estimate | None, signed: bool) -> str:
    """Return "0.547 [0.521, 0.570]"; shares in per cent; an unknown value as a dash."""
    if estimate is None or math.isnan(estimate.mean):
        return "—"
    measure = measure_of(metric)
    style = _DURATIONS.get(metric, ".3f" if measure is None or measure.unit != "share" else ".0%")
    sign = "+" if signed else ""
    mean, low, high = (format(value, sign + style) for value in (estimate.mean, estimate.low, estimate.high))
    return mean if math.isnan(estimate.low) else f"{mean} [{low}, {high}]"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
