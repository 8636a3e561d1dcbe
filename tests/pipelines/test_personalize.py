"""Runs of many subjects: what is started for each, and the table and page of all."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
from PIL import Image

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PersonalizeParams
from dreamartist_pipeline.pipelines.personalize.nodes import run_subjects, tabulate_subjects
from dreamartist_pipeline.starting_runs import RunOutcome, RunRequest, RunResult
from refusals import says
from run_starters import Starter

ROWS = [{"subject": "fox", "image": "fox.png"}, {"subject": "owl", "image": "owl.png", "class_word": "bird"}]


def requested(rows: list[dict[str, Any]], **values: Any) -> list[RunRequest]:
    starter = Starter()
    run_subjects(starter, rows, PersonalizeParams(**values))
    return list(starter.requests)


def test_every_subject_has_a_run_with_its_settings() -> None:
    fox, owl = requested(ROWS)
    assert (fox.subject, fox.pipelines) == ("fox", ("train", "evaluate", "export"))
    assert fox.params == {"subject": "fox", "image": "fox.png"}
    assert owl.params == {"subject": "owl", "image": "owl.png", "class_word": "bird"}
    assert set(fox.results) == {"concept", "evaluation_metrics", "training_history", "contact_sheet"}


def test_the_export_can_be_left_out() -> None:
    assert {one.pipelines for one in requested(ROWS, export=False)} == {("train", "evaluate")}


def test_columns_are_parameters_and_take_precedence_over_those_of_all_runs() -> None:
    row = ROWS[0] | {"training.seed": "7", "training.words.lr": "1e-3", "evaluation.prompts": "['a {pt1}', two]"}
    row |= {"training.schedule": "{kind: constant}", "export.title": "null", "generate.prompts": "a {pt1}, blue"}
    row |= {"generate.seeds": [1, 2]}
    (run,) = requested([row], params={"training": {"seed": 1, "num_steps": 9}})
    assert run.params["training"] == {
        "seed": 7,
        "num_steps": 9,
        "words": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
    }
    assert run.params["evaluation"] == {"prompts": ["a {pt1}", "two"]} and run.params["export"] == {"title": None}
    assert run.params["generate"] == {"prompts": "a {pt1}, blue", "seeds": [1, 2]}


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("trianing.seed", "7", says(expected="training", got="trianing.seed")),
        ("training.seed", "[7", says(expected="the cell training.seed of fox")),
    ],
)
def test_wrong_columns_and_cells_are_refused(column: str, cell: str, message: Any) -> None:
    with pytest.raises(InputError, check=message):
        requested([ROWS[0] | {column: cell}])


def test_workers_and_threads_reach_the_starter() -> None:
    starter = Starter()
    run_subjects(starter, ROWS, PersonalizeParams(workers=3, threads=2))
    assert (starter.workers, starter.threads) == (3, 2)


# --------------------------------------------------------------------------------------------- table and page

METRICS = {
    "similarity/base.net": 0.25,
    "similarity/concept.net": 0.5,
    "prior_drift/net": 0.125,
    "intervals/prior_drift.net.low": 0.1,
}


def finished(subject: str, **metrics: float) -> RunResult:
    return RunResult(RunOutcome(subject), METRICS | metrics, (1.0,), lambda: Image.new("RGB", (2000, 1000), "red"))


FAILED = RunResult(RunOutcome("<owl>", message="no such picture"))


def test_the_table_has_a_row_per_subject_with_its_metrics_or_its_message() -> None:
    table, _ = tabulate_subjects((finished("fox"), FAILED))
    assert list(table["subject"]) == ["fox", "<owl>"]
    assert list(table["outcome"]) == ["finished", "no such picture"]
    assert table.loc[0, "similarity/concept.net"] == 0.5
    assert not [name for name in table.columns if name.startswith("intervals/")]


def test_the_page_has_the_main_measures_and_the_pictures_and_needs_no_other_file() -> None:
    _, page = tabulate_subjects((finished("fox"), finished("cat", **{"prior_drift/net": 0.75}), FAILED))
    cells = re.findall(r"<td>(?:<a[^>]*>)?([^<]*)", page)
    assert cells == ["fox", "0.500", "0.125", "cat", "0.500", "0.750"]
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 2 and len(base64.b64decode(pictures[0])) < 20_000
    assert not re.search(r'(src|href)="https?:', page)
    assert 'href="../fox/report.html"' in page and "&lt;owl&gt;" in page and "<owl>" not in page


def test_without_any_finished_run_the_messages_are_the_error() -> None:
    with pytest.raises(InputError, check=says(got="<owl>: no such picture")):
        tabulate_subjects((FAILED,))
