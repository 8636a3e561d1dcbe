"""Runs of many subjects: what is started for each, and the table and page of all."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from typing import Any

import pytest
from PIL import Image

from dreamartist_pipeline.early_checks import early_checks_of
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PersonalizeParams
from dreamartist_pipeline.pipelines.personalize.nodes import run_subjects, tabulate_subjects
from dreamartist_pipeline.starting_runs import RunOutcome, RunRequest, RunResult, Workers, report_failures
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
    assert {"concept", "evaluation_metrics", "contact_sheet", "report", "exported_files"} <= set(fox.results)


def test_the_export_can_be_left_out() -> None:
    runs = requested(ROWS, export=False)
    assert {one.pipelines for one in runs} == {("train", "evaluate")}
    assert not [name for name in runs[0].results if "export" in name]


def test_columns_are_parameters_and_take_precedence_over_those_of_all_runs() -> None:
    row = ROWS[0] | {"training.seed": "7", "training.words.lr": "1e-3", "evaluation.prompts": "['a {pt1}', two]"}
    row |= {"training.schedule": "{kind: constant}", "export.title": "null", "evaluation.prior_prompts": "a cat, blue"}
    row |= {"export.sampler.batch_size": 2, "evaluation.negative_prompt": "null"}
    (run,) = requested([row], params={"training": {"seed": 1, "num_steps": 9}})
    assert run.params["training"] == {
        "seed": 7,
        "num_steps": 9,
        "words": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
    }
    prompts = {"prompts": ["a {pt1}", "two"], "prior_prompts": "a cat, blue", "negative_prompt": None}
    assert run.params["evaluation"] == prompts
    assert run.params["export"] == {"title": None, "sampler": {"batch_size": 2}}


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("trianing.seed", "7", says(expected="training", got="trianing.seed")),
        ("classword", "bird", says(expected="class_word", got="classword")),
        ("_note", "bird", says(got="_note")),
        ("compare.workers", "7", says(got="compare.workers")),
        ("training.seed", "[7", says(expected="the cell training.seed of fox")),
    ],
)
def test_wrong_columns_and_cells_are_refused_before_the_run(column: str, cell: str, message: Any) -> None:
    (check,) = early_checks_of(run_subjects)
    with pytest.raises(InputError, check=message):
        check.check(PersonalizeParams(), None, [ROWS[0] | {column: cell}])


def test_what_executes_the_runs_reaches_the_starter() -> None:
    starter = Starter()
    run_subjects(starter, ROWS, PersonalizeParams(workers=3, threads=2, ray="local"))
    assert starter.workers == Workers(3, 2, "local")


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
    assert re.findall(r'<th scope="row"><a href="#(\w+)">', page) == ["fox", "cat"]
    assert re.findall(r"<td>([^<]*)", page) == ["0.500", "0.125", "0.500", "0.750"]
    pictures = [b64decode(one) for one in re.findall(r'src="data:image/webp;base64,([^"]+)"', page)]
    assert [Image.open(io.BytesIO(one)).size for one in pictures] == [(1200, 600)] * 2
    assert not re.search(r'(src|href)="https?:', page)
    assert 'href="../fox/report.html"' in page and "&lt;owl&gt;" in page and "<owl>" not in page


@pytest.mark.parametrize(("count", "side_px"), [(51, 480), (501, None)])
def test_contact_sheets_of_many_subjects_are_smaller_and_those_of_very_many_are_links(
    count: int, side_px: int | None
) -> None:
    _, page = tabulate_subjects(tuple(finished(f"s{number}") for number in range(count)))
    embedded = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert len(embedded) == (count if side_px else 0)
    assert not embedded or Image.open(io.BytesIO(b64decode(embedded[0]))).width == side_px
    assert ('src="../s7/contact_sheet.png"' in page) == (side_px is None)


def test_without_any_finished_run_the_messages_are_on_the_page_and_end_the_run() -> None:
    table, page = tabulate_subjects((FAILED,))
    assert list(table["outcome"]) == ["no such picture"] and "Failed: 1" in page
    with pytest.raises(InputError, check=says(got="<owl>: no such picture")):
        report_failures((FAILED,), page)
