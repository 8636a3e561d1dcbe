"""Wiring of the comparison of methods, of the tuning before it, and of sweeps."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.compare.nodes import (
    choose_settings,
    choose_trial,
    run_methods,
    run_settings,
    run_trials,
    tabulate_methods,
    tabulate_settings,
    tabulate_trials,
)
from dreamartist_pipeline.starting_runs import report_failures


def create_pipeline() -> Pipeline:
    """Methods × subjects × seeds → runs → a table, a report and two plots."""
    return Pipeline(
        [
            node(run_methods, ["run_starter", "params:compare"], "compared_runs", name="run_methods"),
            node(
                tabulate_methods,
                ["compared_runs", "params:compare"],
                [
                    "comparison_table",
                    "comparison_report",
                    "comparison_controllability",
                    "comparison_controllability_page",
                    "comparison_drift",
                    "comparison_drift_page",
                ],
                name="tabulate_methods",
            ),
            node(report_failures, ["compared_runs", "comparison_report"], None, name="report_failures"),
        ],
        tags="compare",
    )


def create_tuning_pipeline() -> Pipeline:
    """Methods × settings × subjects of the development → runs → one setting per method."""
    return Pipeline(
        [
            node(run_settings, ["run_starter", "params:compare", "params:tune"], "tuning_runs", name="run_settings"),
            node(tabulate_settings, ["tuning_runs", "params:tune"], "tuning_table", name="tabulate_settings"),
            node(
                choose_settings,
                ["tuning_runs", "params:tune", "tuning_table"],
                "tuned_methods",
                name="choose_settings",
            ),
        ],
        tags="tune",
    )


def create_sweep_pipeline() -> Pipeline:
    """Trials × subjects × seeds → runs → a table, a plot and the best values as an environment."""
    return Pipeline(
        [
            node(run_trials, ["run_starter", "params:sweep"], "sweep_runs", name="run_trials"),
            node(
                tabulate_trials,
                ["sweep_runs", "params:sweep"],
                ["sweep_table", "sweep_plot", "sweep_page"],
                name="tabulate_trials",
            ),
            node(
                choose_trial,
                ["run_starter", "sweep_runs", "params:sweep", "sweep_table"],
                ["swept_parameters", "swept_settings"],
                name="choose_trial",
            ),
        ],
        tags="sweep",
    )
