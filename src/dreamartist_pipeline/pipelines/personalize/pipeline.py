"""Wiring of the runs of many subjects."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.personalize.nodes import run_subjects, tabulate_subjects
from dreamartist_pipeline.starting_runs import report_failures


def create_pipeline() -> Pipeline:
    """Subjects → runs → a table and a page."""
    return Pipeline(
        [
            node(
                run_subjects,
                ["run_starter", "subject_list", "params:personalize"],
                "personalized_runs",
                name="run_subjects",
            ),
            node(
                tabulate_subjects,
                "personalized_runs",
                ["personalized_table", "personalized_page"],
                name="tabulate_subjects",
            ),
            node(report_failures, ["personalized_runs", "personalized_page"], None, name="report_failed_subjects"),
        ],
        tags="personalize",
    )
