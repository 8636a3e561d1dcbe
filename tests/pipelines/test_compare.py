"""The comparison of methods: its runs, its table, its plots, and the tuning before it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dreamartist_pipeline.core.intervals import Estimate
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import CompareParams, TuneParams
from dreamartist_pipeline.pipelines.compare.choosing import choose, tried_settings
from dreamartist_pipeline.pipelines.compare.nodes import (
    CONTROLLABILITY,
    DRIFT,
    choose_settings,
    run_methods,
    run_settings,
    tabulate_methods,
    tabulate_settings,
)
from dreamartist_pipeline.pipelines.compare.tabulating import Row, front, measure_of, title_of
from dreamartist_pipeline.starting_runs import RunOutcome, RunRequest, RunResult, Workers, report_failures
from markdown_tables import cells
from refusals import says
from run_starters import Starter

FIDELITY, AGREEMENT, PRIOR = "similarity/concept.net", "prompt/clip_score.concept", "prior_drift/net"
PROJECT = Path(__file__).resolve().parents[2]


def params(**changes: Any) -> CompareParams:
    values = {
        "methods": {"lora": {"title": "LoRA"}, "pair": {"title": "two LoRAs", "method": "dreamartist-plus-plus"}},
        "reference": "pair",
        "subjects": ["fox", "owl"],
        "images": "pictures",
        "measures": {"fidelity": FIDELITY, "controllability": AGREEMENT, "drift": PRIOR},
        "columns": [FIDELITY, PRIOR],
    }
    return CompareParams.model_validate(values | changes)


def requested(**changes: Any) -> dict[str, RunRequest]:
    starter = Starter()
    run_methods(starter, params(**changes))
    return {one.subject: one for one in starter.requests}


# --------------------------------------------------------------------------------------------- runs


def test_every_method_runs_on_every_subject_with_every_seed() -> None:
    runs = requested(seeds=[0, 7])
    assert list(runs)[:4] == ["fox-lora-0", "fox-pair-0", "fox-lora-7", "fox-pair-7"]
    assert len(runs) == 8
    assert runs["owl-pair-7"].pipelines == ("train", "evaluate")
    assert runs["owl-pair-7"].labels == {"method": "pair", "subject": "owl", "seed": 7}
    assert runs["owl-pair-7"].params == {
        "subject": "owl-pair-7",
        "class_word": "owl",
        "method": "dreamartist-plus-plus",
        "image": "pictures/owl.png",
        "training": {"seed": 7},
    }
    assert runs["owl-lora-0"].params["method"] == "lora"


def test_parameters_of_a_method_take_precedence_over_those_of_all_runs() -> None:
    method = {"title": "LoRA", "params": {"training": {"num_steps": 5}}}
    common = {"training": {"num_steps": 3, "batch_size": 1}, "evaluation": {"seed": 4}}
    runs = requested(methods={"lora": method, "dreamartist": {"title": "words"}}, reference="lora", params=common)
    assert runs["fox-lora-0"].params["training"] == {"num_steps": 5, "batch_size": 1, "seed": 0}
    assert runs["fox-dreamartist-0"].params["training"] == {"num_steps": 3, "batch_size": 1, "seed": 0}
    assert runs["fox-dreamartist-0"].params["evaluation"] == {"seed": 4}


def test_rows_can_be_left_out() -> None:
    assert set(requested(only=["pair"], subjects="owl")) == {"owl-pair-0"}


def test_what_executes_the_runs_reaches_the_starter() -> None:
    starter = Starter()
    run_methods(starter, params(workers=3, threads=2, ray="local"))
    assert starter.workers == Workers(3, 2, "local")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"only": ["nosuch"]}, "nosuch"),
        ({"reference": "nosuch"}, "nosuch"),
        ({"subjects": ["fox", "fox"]}, "fox, fox"),
        ({"seeds": [1, 1]}, "1, 1"),
    ],
)
def test_names_that_do_not_exist_or_repeat_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        params(**changes)


# --------------------------------------------------------------------------------------------- results

Values = Callable[[str, str, int], tuple[float, float, float]]


def results(of: CompareParams, values: Values, failed: Sequence[str] = ()) -> tuple[RunResult, ...]:
    """Return results with these values of fidelity, agreement and drift by method, subject and seed."""
    starter, found = Starter(), []
    for outcome in run_methods(starter, of):
        labels = outcome.labels
        fidelity, agreement, drift = values(labels["method"], labels["subject"], labels["seed"])
        metrics = {FIDELITY: fidelity, AGREEMENT: agreement, PRIOR: drift}
        metrics |= {"similarity/base.net": 0.25, "prompt/clip_score.base": 1.5, "similarity/ceiling.net": 0.875}
        if outcome.subject in failed:
            found.append(RunResult(RunOutcome(outcome.subject, labels, "expected a picture")))
        else:
            found.append(RunResult(outcome, metrics, (1.0, 0.5, 0.5)))
    return tuple(found)


def first_table(report: str) -> str:
    return report.split("Difference", maxsplit=1)[0]


def by_subject(method: str, subject: str, seed: int) -> tuple[float, float, float]:
    shift = 0.25 if subject == "owl" else 0.0
    return (0.5 + shift, 1.0, 0.125) if method == "lora" else (0.625 + shift, 1.25, 0.25)


def test_the_table_has_means_over_subjects_and_seeds_and_paired_differences() -> None:
    of = params(seeds=[0, 1])
    table, report, *_ = tabulate_methods(results(of, by_subject), of)
    rows = table.set_index("row")
    assert list(rows.index) == ["base", "lora", "pair", "ceiling"]
    assert rows.loc["lora", FIDELITY] == 0.625
    assert (rows.loc["lora", f"{FIDELITY} low"], rows.loc["lora", f"{FIDELITY} high"]) == (0.5, 0.75)
    assert rows.loc["lora", [f"difference {FIDELITY}{end}" for end in ("", " low", " high")]].tolist() == [-0.125] * 3
    assert rows.loc["pair", [f"difference {FIDELITY}", f"difference {PRIOR}"]].tolist() == [0, 0]
    assert rows.loc["lora", ["seconds per step", "training, s"]].tolist() == [0.5, 2.0]
    assert cells(first_table(report), "LoRA")[:2] == ["0.625 [0.500, 0.750]", "0.125 [0.125, 0.125]"]
    assert "LoRA | -0.125 [-0.125, -0.125]" in report
    assert "2 methods on 2 subjects (fox, owl), 2 seeds" in report


def test_base_model_and_ceiling_stand_beside_the_methods() -> None:
    table, report, *_ = tabulate_methods(results(params(), by_subject), params())
    rows = table.set_index("row")
    assert rows.loc["base", [FIDELITY, AGREEMENT, PRIOR]].tolist() == [0.25, 1.5, 0.0]
    assert rows.loc["ceiling", FIDELITY] == 0.875
    assert math.isnan(rows.loc["ceiling", PRIOR])
    assert cells(report, "autoencoder's reconstruction (ceiling)")[1] == "—"


def test_methods_are_compared_on_the_subjects_of_which_all_runs_have_finished() -> None:
    found = results(params(), by_subject, failed=["owl-lora-0"])
    table, report, *_ = tabulate_methods(found, params())
    assert table.set_index("row").loc["pair", FIDELITY] == 0.625
    assert "on 1 subject (fox)" in report and "* owl-lora-0: expected a picture" in report
    with pytest.raises(InputError, check=says(expected="4 runs", got="owl-lora-0: expected a picture")):
        report_failures(found, report)
    report_failures(results(params(), by_subject), report)


def test_without_any_complete_subject_there_is_no_table() -> None:
    found = results(params(), by_subject, failed=["owl-lora-0", "fox-pair-0"])
    with pytest.raises(InputError, check=says(got="fox-pair-0")):
        tabulate_methods(found, params())


def test_one_method_alone_has_no_differences() -> None:
    of = params(only=["pair"])
    _, report, *_ = tabulate_methods(results(of, by_subject), of)
    assert "1 method on 2 subjects" in report and "Difference" not in report


def test_a_metric_that_no_run_has_is_refused() -> None:
    of = params(measures={"fidelity": "similarity/concept.other", "controllability": AGREEMENT, "drift": PRIOR})
    with pytest.raises(InputError, check=says(expected=FIDELITY, got="similarity/concept.other")):
        tabulate_methods(results(of, by_subject), of)


def test_methods_with_different_images_of_the_base_model_are_refused() -> None:
    first, *others = results(params(), by_subject)
    other = RunResult(first.outcome, {**first.metrics, "similarity/base.net": 0.3}, first.step_seconds)
    with pytest.raises(InputError, check=says(expected="fox", got="0.300000", remedy="fox-*")):
        tabulate_methods((other, *others), params())


def test_the_table_has_the_columns_that_are_asked_for() -> None:
    of = params(columns=[AGREEMENT])
    _, report, *_ = tabulate_methods(results(of, by_subject), of)
    assert cells(first_table(report), "LoRA")[0] == "1.000 [1.000, 1.000]"


def test_metrics_have_the_titles_of_their_measures() -> None:
    measure = measure_of("similarity_colorless/concept.net")
    assert measure is not None and measure.name == "similarity_colorless"
    assert title_of("similarity_colorless/concept.net") == f"{measure.title} (net)"
    assert title_of("prompt/clip_score.concept").endswith("CLIP")
    assert (measure_of("unknown/metric"), title_of("unknown/metric")) == (None, "unknown/metric")


# --------------------------------------------------------------------------------------------- front, plots


def row(name: str, x: float, y: float) -> Row:
    return Row(name, name, {"x": Estimate(x, x, x), "y": Estimate(y, y, y)}, {})


def test_the_front_has_the_methods_that_no_other_one_dominates() -> None:
    rows = [row("a", 1, 3), row("b", 2, 2), row("c", 2, 1), row("d", 3, 1), row("e", 2, 2), row("f", math.nan, 9)]
    assert front([*rows, row("base", 9, 9)], [("x", 1), ("y", 1)]) == ["a", "b", "d", "e"]
    assert front(rows, [("x", -1), ("y", 1)]) == ["a"]


def test_plots_mark_the_front_and_show_intervals() -> None:
    _, report, plot, page, drift, _ = tabulate_methods(results(params(), by_subject), params())
    assert plot is page
    assert f"Not dominated in {CONTROLLABILITY}: two LoRAs." in report
    assert f"Not dominated in {DRIFT}: LoRA; two LoRAs." in report
    line, lora, pair, base = plot.data
    assert (line.mode, list(line.x), list(line.y)) == ("lines", [1.25], [0.75])
    assert (lora.name, lora.text[0], list(lora.x), list(lora.y)) == ("1  LoRA", "1", [1.0], [0.625])
    assert (lora.error_y.array[0], lora.error_y.arrayminus[0]) == (0.125, 0.125)
    assert pair.marker.color != lora.marker.color  # filled, and not
    assert (base.name, base.marker.symbol) == ("B  base model, class word", "square")
    assert list(drift.data[0].x) == [0.125, 0.25]
    assert "lower is better" in drift.layout.xaxis.title.text


# --------------------------------------------------------------------------------------------- tuning


def tuning(**changes: Any) -> TuneParams:
    values = {
        "settings": {
            "lora": [{}, {"training": {"num_steps": 9}}, {"training": {"batch_size": 2}}],
            "pair": [{}, {"training": {"num_steps": 8}}, {}],
        },
        "subjects": ["cup", "jug"],
        "objective": {FIDELITY: 2.0, AGREEMENT: 1.0},
    }
    return TuneParams.model_validate(values | changes)


def test_every_setting_runs_on_the_subjects_of_the_tuning() -> None:
    starter = Starter()
    run_settings(starter, params(params={"evaluation": {"seed": 4}}), tuning(seeds=[3]))
    assert len(starter.requests) == 2 * 3 * 2
    runs = {one.subject: one for one in starter.requests}
    one = runs["tune-jug-lora-1-3"]
    assert one.params["training"] == {"num_steps": 9, "seed": 3}
    assert one.params["image"] == "pictures/jug.png"
    assert one.params["evaluation"] == {"seed": 4}
    assert one.labels == {"method": "lora", "subject": "jug", "seed": 3, "setting": 1}


def test_a_setting_replaces_what_a_method_was_tuned_to_before() -> None:
    methods = {"lora": {"title": "LoRA", "params": {"training": {"num_steps": 5}}}, "pair": {"title": "two"}}
    starter = Starter()
    run_settings(starter, params(methods=methods), tuning())
    assert starter.requests[0].params["training"] == {"seed": 0}


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"settings": {"lora": [{}]}}, says(expected="tune.settings", got="pair")),
        ({"settings": {"lora": [{}], "pair": [{}], "other": [{}]}}, says(expected="lora, pair", got="other")),
        ({"subjects": ["cup", "fox"]}, says(expected="tune.subjects", got="fox")),
    ],
)
def test_a_tuning_that_does_not_fit_the_comparison_is_refused(changes: dict[str, Any], check: Any) -> None:
    with pytest.raises(InputError, check=check):
        run_settings(Starter(), params(), tuning(**changes))


def test_every_method_has_the_same_budget() -> None:
    with pytest.raises(ValidationError, match="lora: 1, pair: 2"):
        tuning(settings={"lora": [{}], "pair": [{}, {}]})


def tuned(of: TuneParams, values: dict[tuple[str, int], tuple[float, float, float]]) -> tuple[RunResult, ...]:
    """Return results with fidelity, agreement and seconds per step by method and setting; NaN is a failed run."""
    starter, found = Starter(), []
    for outcome in run_settings(starter, params(), of):
        fidelity, agreement, seconds = values[outcome.labels["method"], outcome.labels["setting"]]
        if math.isnan(fidelity) and outcome.labels["subject"] == "jug":
            found.append(RunResult(RunOutcome(outcome.subject, outcome.labels, "diverged")))
        else:
            found.append(RunResult(outcome, {FIDELITY: fidelity, AGREEMENT: agreement}, (seconds,) * 3))
    return tuple(found)


VALUES = {
    ("lora", 0): (0.50, 1.0, 1.0),
    ("lora", 1): (0.60, 1.0, 1.2),
    ("lora", 2): (0.55, 1.2, 1.0),
    ("pair", 0): (0.50, 1.0, 2.0),
    ("pair", 1): (0.90, 1.0, 3.0),
    ("pair", 2): (math.nan, 9.0, 2.0),
}


def chosen(of: TuneParams) -> dict[str, int]:
    return choose(tried_settings(tuned(of, VALUES), of), of)


def test_the_setting_with_the_highest_weighted_sum_is_chosen_unless_its_steps_are_slow_or_a_run_failed() -> None:
    assert chosen(tuning()) == {"lora": 2, "pair": 0}  # 2 · 0.55 + 1.2 > 2 · 0.6 + 1
    assert chosen(tuning(objective={FIDELITY: 1.0})) == {"lora": 1, "pair": 0}
    assert chosen(tuning(objective={FIDELITY: 1.0}, max_step_cost=1.5)) == {"lora": 1, "pair": 1}
    assert chosen(tuning(objective={FIDELITY: 1.0}, max_step_cost=1.1)) == {"lora": 2, "pair": 0}


def test_the_chosen_settings_are_parameters_of_an_environment() -> None:
    of = tuning()
    results = tuned(of, VALUES | {("pair", 2): (0.1, 1.0, 2.0)})
    table = tabulate_settings(results, of)
    assert choose_settings(results, of, table) == {
        "compare": {"methods": {"lora": {"params": {"training": {"batch_size": 2}}}, "pair": {"params": {}}}}
    }
    lora = table[table["method"] == "lora"]
    assert lora["chosen"].tolist() == [False, False, True]
    assert lora["score"].tolist() == pytest.approx([2.0, 2.2, 2.3])
    assert lora["cost of a step"].tolist() == [1.0, 1.2, 1.0]
    assert json.loads(lora["params"].iloc[1]) == {"training": {"num_steps": 9}}


def test_the_cost_of_a_step_is_that_of_the_fastest_run() -> None:
    of = tuning()
    slow = [
        RunResult(one.outcome, one.metrics, tuple(9 * s for s in one.step_seconds))
        if one.outcome.labels["subject"] == "cup"
        else one
        for one in tuned(of, VALUES)
    ]
    assert [one.step_seconds for one in tried_settings(slow, of)] == [1.0, 1.2, 1.0, 2.0, 3.0, 18.0]


def test_a_tuning_of_which_a_run_failed_is_tabulated_and_replaces_no_earlier_choice() -> None:
    of = tuning()
    results = tuned(of, VALUES)
    table = tabulate_settings(results, of)
    assert table["score"].isna().tolist() == [False] * 5 + [True]
    with pytest.raises(InputError, check=says(expected="all 12 runs", got="tune-jug-pair-2-0: diverged")):
        choose_settings(results, of, table)


def test_a_tuning_without_any_score_is_refused() -> None:
    of = tuning(objective={FIDELITY: 1.0, "recognition/concept.judge": 0.5})
    with pytest.raises(InputError, check=says(expected="tune.objective", got="recognition/concept.judge")):
        tabulate_settings(tuned(of, VALUES), of)
    failed = [RunResult(RunOutcome(one.outcome.subject, one.outcome.labels, "diverged")) for one in tuned(of, VALUES)]
    with pytest.raises(InputError, check=says(got="tune-cup-lora-0-0: diverged")):
        tabulate_settings(tuple(failed), of)


def test_the_projects_tuning_has_six_settings_of_every_method_on_three_subjects_of_the_development() -> None:
    of, tune = (
        yaml.safe_load((PROJECT / f"conf/base/parameters_{name}.yml").read_text())[name] for name in ("compare", "tune")
    )
    starter = Starter()
    run_settings(starter, CompareParams.model_validate(of), TuneParams.model_validate(tune))
    assert {len(settings) for settings in tune["settings"].values()} == {6}
    assert len(starter.requests) == 10 * 6 * 3
    assert set(tune["subjects"]) <= {"guitar", "sailboat", "pineapple", "cupcake", "teapot"}
    assert len(of["subjects"]) == 10
