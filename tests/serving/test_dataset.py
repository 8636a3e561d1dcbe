"""The dataset of the MLflow models: a folder and versions in the registry, and that a save never fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from dreamartist_pipeline.backbones.served import ServedConcept
from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.serving.dataset import RegisteredModelDataset
from refusals import says
from tracking_stores import tracking_uri


@pytest.fixture
def run_id(tmp_path: Path) -> Iterator[str]:
    """Yield the id of a run that is active."""
    with tracking_uri(f"sqlite:///{tmp_path}/mlflow.db"):
        experiment = mlflow.create_experiment("dreamartist", artifact_location=(tmp_path / "artifacts").as_uri())
        with mlflow.start_run(experiment_id=experiment) as run:
            yield run.info.run_id


@pytest.fixture
def dataset(tmp_path: Path) -> RegisteredModelDataset:
    return RegisteredModelDataset(name="fox", path=str(tmp_path / "mlflow"))


def test_a_saved_model_is_a_version_and_is_loaded_by_its_alias(
    run_id: str, dataset: RegisteredModelDataset, serve: Callable[..., ServedConcept]
) -> None:
    dataset.save((serve(),))
    version = mlflow.MlflowClient().get_model_version_by_alias("fox", "last")
    assert version.run_id == run_id
    example = json.loads((dataset._path / "last" / "serving_input_example.json").read_text())
    prompts = pd.DataFrame(**example["dataframe_split"])
    models = (mlflow.pyfunc.load_model("models:/fox@last"), dataset.load()["last"])
    registered, written = (model.predict(prompts, params=example["params"]) for model in models)
    assert registered.equals(written)


def test_without_a_run_the_model_is_only_written(
    tmp_path: Path, dataset: RegisteredModelDataset, serve: Callable[..., ServedConcept]
) -> None:
    with tracking_uri(f"sqlite:///{tmp_path}/mlflow.db"):
        dataset.save((serve(),))
        assert not mlflow.MlflowClient().search_registered_models()
    assert list(dataset.load()) == ["last"]


def test_nothing_is_written_where_registration_is_off(run_id: str, dataset: RegisteredModelDataset) -> None:
    dataset.save(())
    assert not dataset.exists() and not mlflow.MlflowClient().search_registered_models()


def test_a_registry_that_fails_is_reported_and_fails_nothing(
    run_id: str,
    dataset: RegisteredModelDataset,
    serve: Callable[..., ServedConcept],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("Connection refused")

    monkeypatch.setattr("mlflow.MlflowClient.create_registered_model", fails)
    dataset.save((serve(),))
    assert "fox" in caplog.text and "connection refused" in caplog.text
    assert dataset.exists()


def test_a_model_that_cannot_be_written_is_reported_and_leaves_the_earlier_one(
    dataset: RegisteredModelDataset,
    serve: Callable[..., ServedConcept],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    dataset.save((serve(),))
    before = (dataset._path / "last" / "MLmodel").read_bytes()
    monkeypatch.setattr("mlflow.pyfunc.save_model", full)
    with caplog.at_level(logging.WARNING):
        dataset.save((serve(),))
    assert "fox" in caplog.text
    assert (dataset._path / "last" / "MLmodel").read_bytes() == before
    assert [folder.name for folder in dataset._path.parent.iterdir()] == ["mlflow"]


def test_the_preview_shows_signature_example_and_base_model(
    dataset: RegisteredModelDataset, serve: Callable[..., ServedConcept], tiny_base_model: Path
) -> None:
    dataset.save((serve(),))
    shown = json.loads(dataset.preview())["last"]
    assert shown["signature"]["inputs"][0]["name"] == "prompt"
    assert shown["example"]["params"]["seed"] == 7
    assert shown["configuration"]["base_model"] == str(tiny_base_model)


def test_a_missing_model_is_named_with_its_pipeline(dataset: RegisteredModelDataset) -> None:
    with pytest.raises(Exception) as raised:
        dataset.load()
    cause = raised.value if isinstance(raised.value, FileError) else raised.value.__cause__
    assert isinstance(cause, FileError) and says(expected="mlflow", remedy="register")(cause)
