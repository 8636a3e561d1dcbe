"""Start a run for each subject, and show all of them in one table and on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.early_checks import checked_early
from dreamartist_pipeline.params import PersonalizeParams
from dreamartist_pipeline.pipelines.personalize.planning import check_rows, subject_runs
from dreamartist_pipeline.starting_runs import RunOutcome, RunResult, RunStarter

if TYPE_CHECKING:
    from pandas import DataFrame
else:  # Kedro evaluates a node's annotations when it registers the pipelines; this import is slow
    DataFrame = Any


@checked_early("personalize", check_rows, "subject_list")
def run_subjects(
    run_starter: RunStarter, subject_list: Sequence[Mapping[str, Any]], params: PersonalizeParams
) -> tuple[RunOutcome, ...]:
    """Train and evaluate every subject, unless that has been done with the same picture, parameters and models.

    Raises:
        InputError: invalid parameters of a subject; nothing is started.
    """
    return run_starter.start(subject_runs(subject_list, params), params.executed_by)


def tabulate_subjects(results: tuple[RunResult, ...]) -> tuple[DataFrame, str]:
    """Return a table with a row per subject, and a page with the contact sheets."""
    from pandas import DataFrame

    from dreamartist_pipeline.pipelines.personalize.page import render

    rows = [
        {
            "subject": one.outcome.subject,
            "outcome": one.outcome.message or "finished",
            **{name: value for name, value in one.metrics.items() if not name.startswith("intervals/")},
        }
        for one in results
    ]
    return DataFrame(rows), render(results)
