"""Sweeps: the space, the trials that Optuna chooses, and what is made of their results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamartist_pipeline.core.halving import Halving
from dreamartist_pipeline.early_checks import early_checks_of
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import HalvingParams, ParameterSearchParams
from dreamartist_pipeline.pipelines.compare.nodes import choose_trial, run_trials, tabulate_trials
from dreamartist_pipeline.pipelines.compare.planning import SEARCH, VALUES
from dreamartist_pipeline.pipelines.compare.plotting import plot_trials
from dreamartist_pipeline.pipelines.compare.sweeping import SweepRuns
from dreamartist_pipeline.pipelines.compare.trials import FAILED, FINISHED, STOPPED, Trial, judged_trials
from dreamartist_pipeline.starting_runs import RunOutcome, RunRequest, RunResult, Workers
from refusals import says
from run_starters import Starter

RATES = {"low": 1e-3, "high": 1e-1, "log": True}
SPACE = {"training": {"words": {"lr": RATES}, "guidance_scale": ["2.0", "3.0"]}, "method": ["lora", "t-lora"]}
METRIC = "similarity/x"


def sweep(folder: Path, **values: Any) -> ParameterSearchParams:
    given = {"space": SPACE, "trials": 6, "subjects": ["owl"], "images": "pictures", "folder": str(folder)}
    return ParameterSearchParams.model_validate(given | {"objective": {METRIC: 2.0}} | values)


def rate(request: RunRequest) -> float:
    return float(request.labels[VALUES]["training.words.lr"])


def run_all(params: ParameterSearchParams, score: Callable[[RunRequest], float | None]) -> list[RunResult]:
    """Run a sweep, with scores for trainings; None for one that fails."""
    runs, results = SweepRuns(params), []
    for request in runs:
        value = score(request)
        outcome = RunOutcome(request.subject, request.labels, None if value is not None else "too hot")
        results.append(RunResult(outcome, {} if value is None else {METRIC: value}))
        runs.ended(results[-1])
    return results


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_values_are_within_the_space_and_the_same_at_every_call(search: str, tmp_path: Path) -> None:
    first = run_all(sweep(tmp_path / "a", search=search), rate)
    again = run_all(sweep(tmp_path / "b", search=search), rate)
    values = [one.outcome.labels[VALUES] for one in first]
    assert values == [one.outcome.labels[VALUES] for one in again]
    assert len({value["training.words.lr"] for value in values}) == 6
    assert all(1e-3 <= value["training.words.lr"] <= 1e-1 for value in values)
    assert {value["training.guidance_scale"] for value in values} <= {"2.0", "3.0"}
    other = run_all(sweep(tmp_path / "c", search=search, seed=1), rate)
    assert values != [one.outcome.labels[VALUES] for one in other]


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    space = {"training": {"guidance_scale": ["2.0", "3.0"], "num_steps": [1, 2, 3]}}
    runs = SweepRuns(sweep(tmp_path, space=space, search="grid", trials=20))
    assert len(runs) == 6
    values = [tuple(request.labels[VALUES].values()) for request in runs]
    assert sorted(values) == [(scale, seed) for scale in ("2.0", "3.0") for seed in (1, 2, 3)]


def test_tpe_learns_from_the_trials(tmp_path: Path) -> None:
    def closeness(request: RunRequest) -> float:
        return -abs(rate(request) - 0.02)

    space, count = {"training": {"words": {"lr": {"low": 0.0, "high": 1.0}}}}, 60
    errors = {
        search: [
            abs(one.outcome.labels[VALUES]["training.words.lr"] - 0.02)
            for one in run_all(sweep(tmp_path / search, search=search, space=space, trials=count), closeness)[30:]
        ]
        for search in ("random", "tpe")
    }
    assert sum(errors["tpe"]) < 0.5 * sum(errors["random"])


def test_a_sweep_that_was_stopped_goes_on_with_its_trials(tmp_path: Path) -> None:
    params = sweep(tmp_path)
    whole = run_all(sweep(tmp_path / "whole"), rate)
    runs = SweepRuns(params)
    for count, request in enumerate(runs):
        if count == 3:  # asked for, and not finished
            break
        runs.ended(RunResult(RunOutcome(request.subject, request.labels), {METRIC: rate(request)}))
    again = run_all(params, rate)
    assert [one.outcome.labels for one in again] == [one.outcome.labels for one in whole]
    more = run_all(params.model_copy(update={"trials": 8}), rate)
    assert [one.outcome.labels for one in more[:6]] == [one.outcome.labels for one in whole]
    changed = run_all(params.model_copy(update={"seed": 5}), rate)
    assert [one.outcome.labels for one in changed] != [one.outcome.labels for one in whole]


def test_a_trial_has_a_run_for_each_subject_and_seed_and_the_mean_is_its_score(tmp_path: Path) -> None:
    params = sweep(tmp_path, subjects=["owl", "fox"], seeds=[0, 1], trials=2, params={"training": {"num_steps": 9}})
    scores = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, None])
    results = run_all(params, lambda _: next(scores))
    first, second = judged_trials(results, params)
    assert (first.state, round(first.score, 6)) == (FINISHED, 0.5)
    assert second.state == FAILED and second.score != second.score
    assert [one.outcome.subject for one in results[:4]] == [
        f"sweep-{results[0].outcome.labels[SEARCH]}-0-{subject}-{seed}" for subject in ("owl", "fox") for seed in (0, 1)
    ]
    one = next(iter(SweepRuns(params)))
    assert one.params["image"] == "pictures/owl.png" and one.params["class_word"] == "owl"
    assert one.params["method"] in ("lora", "t-lora") and one.params["training"]["num_steps"] == 9
    assert "scoring" not in one.params["training"]


def test_what_executes_the_runs_reaches_the_starter(tmp_path: Path) -> None:
    starter = Starter()
    run_trials(starter, sweep(tmp_path, name="rates", workers=2, threads=1, ray="local"))
    assert starter.workers == Workers(2, 1, "local")
    names = [one.subject for one in starter.requests]
    assert len({*names}) == 6 and all(re.fullmatch(r"rates-[0-9a-f]{6}-[0-5]-owl-0", name) for name in names)


def test_every_value_is_checked_before_the_first_run(tmp_path: Path) -> None:
    examples = SweepRuns(sweep(tmp_path)).examples()
    values = [one.labels[VALUES] for one in examples]
    assert {value["training.words.lr"] for value in values} == {1e-3, 1e-1}
    assert {value["method"] for value in values} == {"lora", "t-lora"}
    assert len(values) == 4


def test_trials_that_were_stopped_early_are_neither_chosen_nor_forgotten(tmp_path: Path) -> None:
    params = sweep(tmp_path, halving={"first": 2})

    def train(request: RunRequest) -> float:
        own = HalvingParams.model_validate(request.params["training"]["scoring"]["halving"])
        Halving(own).note(2, -rate(request))
        return rate(request)

    trials = judged_trials(results := run_all(params, train), params)
    stopped = [one for one in trials if one.state == STOPPED]
    assert stopped and trials[0].state == FINISHED
    table, plot, _ = tabulate_trials(tuple(results), params)
    assert table["state"].tolist() == [FINISHED] * (6 - len(stopped)) + [STOPPED] * len(stopped)
    finished = table["score"].tolist()[: 6 - len(stopped)]
    assert finished == sorted(finished, reverse=True)
    assert sorted(axis for axis in plot.layout if axis.startswith("xaxis")) == ["xaxis", "xaxis2", "xaxis3"]
    parameters, settings = choose_trial(Starter(), tuple(results), params, table)
    assert parameters["training"]["words"]["lr"] == pytest.approx(table["training.words.lr"][0])
    assert settings["method"] == table["method"][0]
    assert "halving" not in json.dumps(parameters)


def test_without_a_finished_trial_the_runs_that_failed_are_listed(tmp_path: Path) -> None:
    params = sweep(tmp_path, trials=2)
    results = run_all(params, lambda _: None)
    table, _, _ = tabulate_trials(tuple(results), params)
    assert table["message"].tolist() == ["too hot", "too hot"]
    with pytest.raises(InputError, check=says(got="too hot")):
        choose_trial(Starter(), tuple(results), params, table)


def test_if_all_trials_were_stopped_the_rungs_are_to_be_changed(tmp_path: Path) -> None:
    params = sweep(tmp_path, subjects=["owl", "fox"], trials=2, halving={"first": 1})
    standings = iter([0.9, 0.1, 0.1, 0.9])  # each trial is the better one of one subject

    def train(request: RunRequest) -> float:
        own = HalvingParams.model_validate(request.params["training"]["scoring"]["halving"])
        if own.run.endswith("-0-fox-0"):
            Halving(own.model_copy(update={"run": "another"})).note(1, 0.5)
        Halving(own).note(1, next(standings))
        return 1.0

    results = run_all(params, train)
    with pytest.raises(InputError, check=says(got="stopped early", remedy="sweep.halving.first")):
        choose_trial(Starter(), tuple(results), params, None)


def test_equal_subjects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="subjects: expected each one once"):
        sweep(tmp_path, subjects=["owl", "owl"])


def test_other_parameters_of_the_command_begin_another_search(tmp_path: Path) -> None:
    names = {SweepRuns(sweep(tmp_path), other).search.name for other in ({}, {"training": {"num_steps": 9}})}
    moved = SweepRuns(sweep(tmp_path / "elsewhere", images="/other", workers=3, trials=9), {}).search.name
    assert len(names) == 2 and moved in names


def test_an_unknown_metric_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, check=says(expected=METRIC, got="nosuch")):
        run_all(sweep(tmp_path, objective={"nosuch": 1.0}), rate)


@pytest.mark.parametrize(
    ("changes", "expected", "got"),
    [
        ({"space": {}}, "sweep.space", "none"),
        ({"space": {"training": {"num_steps": 5}}}, "training.num_steps", "5"),
        ({"space": {"training": {"num_steps": []}}}, "training.num_steps", "[]"),
        ({"space": {"training": {"num_steps": {"low": 5}}}}, "training.num_steps", "high"),
        ({"space": {"training": {"num_steps": {"low": 5, "high": 2}}}}, "training.num_steps", "low below high"),
        ({"space": {"training": {"words": {"lr": {"low": 0, "high": 2, "log": True}}}}}, "lr", "above 0"),
        ({"space": {"training": {"words": {"lr": RATES}}}, "search": "grid"}, "list", "training.words.lr"),
        ({"space": {"training": {"seed": [1, 2]}}}, "sweep.seeds", "training.seed"),
        ({"space": {"image": ["a.png", "b.png"]}}, "sweep.subjects", "image"),
        ({"space": {"training": {"scoring": {"halving": {"first": [1, 2]}}}}}, "sweep.halving", "halving.first"),
        ({"subjects": ["owl", "gone"]}, "picture", "gone.png"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_early(
    changes: dict[str, Any], expected: str, got: str, tmp_path: Path
) -> None:
    (check,) = early_checks_of(run_trials)
    (tmp_path / "owl.png").touch()
    changes = {"images": str(tmp_path)} | changes
    check.check(sweep(tmp_path, images=str(tmp_path)), None)
    with pytest.raises(InputError, check=says(expected=expected, got=got)):
        check.check(sweep(tmp_path, **changes), None)


def test_a_damaged_file_of_trials_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/trials.journal").write_text("{no json\n{}\n")
    with pytest.raises(InputError, check=says(expected="trials.journal", remedy="move")):
        SweepRuns(sweep(tmp_path))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["t-lora", "dreamartist-plus-plus-t-lora"], ["dreamartist-<br>plus-plus-t-lora", "t-lora"]),
        (["10.0", "2.0", "3.0"], ["2.0", "3.0", "10.0"]),
        ([[{"lr": 2, "layers": "x" * 60}], None], ['[{"lr": 2, "laye… #1', "null"]),
    ],
)
def test_categories_are_in_one_order_and_their_labels_short(values: list[Any], expected: list[str]) -> None:
    trials = [Trial(number, {("value",): value}, FINISHED, 0.1 * number) for number, value in enumerate(values)]
    figure = plot_trials(trials)
    (axis,) = figure.select_xaxes()
    assert list(axis.categoryarray) == expected
    assert {label for trace in figure.data for label in trace.x} == set(expected)
