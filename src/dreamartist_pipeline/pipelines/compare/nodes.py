"""Start the runs of a comparison, a tuning or a sweep, and read them as tables and plots."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.early_checks import checked_early
from dreamartist_pipeline.params import CompareParams, ParameterSearchParams, TuneParams
from dreamartist_pipeline.pipelines.compare.space import check_space
from dreamartist_pipeline.starting_runs import RunOutcome, RunResult, RunStarter, report_failures

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure
else:  # Kedro evaluates a node's annotations when it registers the pipelines; these imports are slow
    DataFrame = Figure = Any

CONTROLLABILITY, DRIFT = "fidelity against controllability", "fidelity against prior drift"

log = logging.getLogger(__name__)


def run_methods(run_starter: RunStarter, params: CompareParams) -> tuple[RunOutcome, ...]:
    """Train and evaluate every method on every subject with every seed.

    Raises:
        InputError: invalid parameters of a run; nothing is started.
    """
    from dreamartist_pipeline.pipelines.compare.planning import compared_runs

    return run_starter.start(compared_runs(params), params.executed_by)


def tabulate_methods(
    results: tuple[RunResult, ...], params: CompareParams
) -> tuple[DataFrame, str, Figure, Figure, Figure, Figure]:
    """Compare the methods on the subjects of which all runs have finished.

    Returns:
        The table, the report in markdown, and both plots, each for kedro-viz and as a page of its own.

    Raises:
        InputError: there is no such subject, or the runs do not have these metrics.
    """
    from pandas import DataFrame

    from dreamartist_pipeline.pipelines.compare.plotting import plot_tradeoff
    from dreamartist_pipeline.pipelines.compare.reporting import as_records, to_markdown
    from dreamartist_pipeline.pipelines.compare.tabulating import Comparison, front, tabulate

    comparison, of = Comparison(params, results), params.measures
    comparison.check()
    rows = tabulate(comparison)
    fronts = {
        CONTROLLABILITY: front(rows, [(of.controllability, 1), (of.fidelity, 1)]),
        DRIFT: front(rows, [(of.drift, -1), (of.fidelity, 1)]),
    }
    controllability = plot_tradeoff(rows, of.controllability, of.fidelity, fronts[CONTROLLABILITY], "higher")
    drift = plot_tradeoff(rows, of.drift, of.fidelity, fronts[DRIFT], "lower")
    report = to_markdown(comparison, rows, fronts)
    return DataFrame(as_records(rows, fronts)), report, controllability, controllability, drift, drift


def run_settings(run_starter: RunStarter, params: CompareParams, tuning: TuneParams) -> tuple[RunOutcome, ...]:
    """Train and evaluate every setting of every method on the subjects of the tuning.

    Raises:
        InputError: methods without settings, subjects that are compared later, or invalid parameters of a run; nothing
            is started.
    """
    from dreamartist_pipeline.pipelines.compare.planning import tuning_runs

    return run_starter.start(tuning_runs(params, tuning), params.executed_by)


def tabulate_settings(results: tuple[RunResult, ...], tuning: TuneParams) -> DataFrame:
    """Return a table with one row per setting.

    Raises:
        InputError: all runs failed, or none has a metric of the objective.
    """
    from pandas import DataFrame

    from dreamartist_pipeline.pipelines.compare.choosing import as_records, check_objective, choose, tried_settings

    check_objective(results, tuning)
    settings = tried_settings(results, tuning)
    return DataFrame(as_records(settings, choose(settings, tuning), tuning))


def choose_settings(results: tuple[RunResult, ...], tuning: TuneParams, table: object) -> dict[str, Any]:
    """Choose the setting of every method with the highest objective, within the bound on the cost of a step.

    Args:
        results: of the tuning.
        tuning: its parameters.
        table: of all settings, which is stored before.

    Returns:
        The chosen settings as parameters of an environment.

    Raises:
        InputError: a run failed: the methods would not have had the same budget, and an earlier choice stays.
    """
    from dreamartist_pipeline.pipelines.compare.choosing import choose, overlay, tried_settings

    report_failures(results, table)
    chosen = choose(tried_settings(results, tuning), tuning)
    for method, index in chosen.items():
        log.info("%s: setting %d, %s", method, index, tuning.settings[method][index] or "its own values")
    return overlay(chosen, tuning)


@checked_early("sweep", check_space)
def run_trials(run_starter: RunStarter, params: ParameterSearchParams) -> tuple[RunOutcome, ...]:
    """Train and evaluate all subjects with the values of every trial.

    Raises:
        InputError: nothing to search, values that are invalid, or no Optuna; nothing is started.
    """
    from dreamartist_pipeline.pipelines.compare.sweeping import SweepRuns

    parameters, settings = run_starter.environment_of({})
    others = {name: section for name, section in parameters.items() if name not in ("device", "sweep")}
    return run_starter.start(SweepRuns(params, (others, settings)), params.executed_by)


def tabulate_trials(results: tuple[RunResult, ...], params: ParameterSearchParams) -> tuple[DataFrame, Figure, Figure]:
    """Return a table with one row per trial, the best first, and a plot of their values, for kedro-viz and as a page.

    Raises:
        InputError: a finished run does not have a metric of the objective.
    """
    from pandas import DataFrame

    from dreamartist_pipeline.pipelines.compare.plotting import plot_trials
    from dreamartist_pipeline.pipelines.compare.trials import as_records, judged_trials

    trials = judged_trials(results, params)
    plot = plot_trials(trials)
    return DataFrame(as_records(trials, results, params)), plot, plot


def choose_trial(
    run_starter: RunStarter, results: tuple[RunResult, ...], params: ParameterSearchParams, _table: object
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters and the run settings of the best trial, for an environment with the name of the sweep.

    Raises:
        InputError: no trial has finished.
    """
    from dreamartist_pipeline.pipelines.compare.trials import best, judged_trials, params_of_runs

    chosen = best(judged_trials(results, params), results)
    log.info("Trial %d is the best: %s, score %.4f.", chosen.number, chosen.described(), chosen.score)
    parameters, settings = run_starter.environment_of(params_of_runs(chosen, params))
    command = f"kedro run --pipelines train --env best-{params.name}"
    log.info("With its values: %s --params subject=NAME,class_word=WORD,image=FILE", command)
    return parameters, settings
