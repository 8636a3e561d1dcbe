"""The list of runs, and what they have measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.datasets.run_results import RunResultsDataset
from dreamartist_pipeline.starting_runs import RunOutcome, RunResult
from refusals import says

OUTCOMES = (RunOutcome("fox-lora", {"seed": 0}), RunOutcome("owl-lora", {"seed": 1}, "no picture"))


@pytest.fixture
def dataset(tmp_path: Path) -> RunResultsDataset:
    folder = tmp_path / "fox-lora"
    folder.mkdir()
    (folder / "evaluation_metrics.json").write_text(json.dumps({"similarity": 0.5}))
    (folder / "training_history.csv").write_text("step,seconds\n1,0.5\n2,0.25\n")
    return RunResultsDataset(filepath=str(tmp_path / "compare/runs.json"), path=str(tmp_path))


def test_runs_are_loaded_with_their_metrics_and_failed_ones_without(dataset: RunResultsDataset) -> None:
    dataset.save(OUTCOMES)
    assert dataset.load() == (RunResult(OUTCOMES[0], {"similarity": 0.5}, (0.5, 0.25)), RunResult(OUTCOMES[1]))


def test_the_preview_shows_what_failed(dataset: RunResultsDataset) -> None:
    dataset.save(OUTCOMES)
    assert dict(dataset.preview())["data"] == [["fox-lora", "finished"], ["owl-lora", "no picture"]]


def test_a_finished_run_without_reports_is_refused(dataset: RunResultsDataset, tmp_path: Path) -> None:
    dataset.save(OUTCOMES)
    (tmp_path / "fox-lora/training_history.csv").write_text("step\n1\n")
    with pytest.raises(FileError, check=says(expected="fox-lora", got="seconds")):
        dataset.load()
    (tmp_path / "fox-lora/evaluation_metrics.json").unlink()
    with pytest.raises(FileError, check=says(expected="fox-lora", got="FileNotFoundError")):
        dataset.load()


def test_there_is_nothing_to_load_before_runs_are_started(dataset: RunResultsDataset) -> None:
    assert not dataset.exists()
    with pytest.raises(FileError, check=says(expected="runs.json")):
        dataset.load()
