"""Models in MLflow's registry: versions, aliases, interrupted tries, secrets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreamartist_pipeline.tracking.delivery import Delivery
from dreamartist_pipeline.tracking.models import CONCEPT_TAG, model_record, send_model
from dreamartist_pipeline.tracking.outbox import Outbox, Record
from tracking_stores import tracking_uri


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import mlflow

    folder = tmp_path_factory.mktemp("store")
    with tracking_uri(f"sqlite:///{folder}/mlflow.db"):
        mlflow.create_experiment("dreamartist", artifact_location=(folder / "artifacts").as_uri())
        yield mlflow.MlflowClient()


@pytest.fixture
def run_id(client: Any) -> str:
    experiment = client.get_experiment_by_name("dreamartist")
    return str(client.create_run(experiment.experiment_id).info.run_id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return what stands for the folder of an MLflow model."""
    (tmp_path / "last" / "artifacts").mkdir(parents=True)
    (tmp_path / "last" / "MLmodel").write_text("flavors: {}")
    (tmp_path / "last" / "artifacts" / "concept.safetensors").write_bytes(b"concept")
    return tmp_path / "last"


def record(folder: Path, name: str, *aliases: str, sha256: str = "abcd") -> Record:
    return model_record(folder, name, aliases or ("last",), sha256, {"trigger_words": "my-fox", "num_steps": "5"})


def version_of(client: Any, name: str, alias: str = "last") -> Any:
    return client.get_model_version_by_alias(name, alias)


def test_a_model_becomes_a_version_of_its_run_with_its_files(client: Any, run_id: str, folder: Path) -> None:
    send_model(run_id, record(folder, "files"))
    version = version_of(client, "files")
    assert (str(version.version), version.run_id, version.tags[CONCEPT_TAG]) == ("1", run_id, "abcd")
    assert "my-fox" in version.description
    (output,) = client.get_run(run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.status, model.params["num_steps"]) == ("files", "READY", "5")
    stored = Path(model.artifact_location.removeprefix("file://"))
    assert (stored / "artifacts" / "concept.safetensors").read_bytes() == b"concept"


def test_every_model_is_a_new_version_to_which_the_alias_moves(client: Any, run_id: str, folder: Path) -> None:
    send_model(run_id, record(folder, "versions", "best", "last"))
    send_model(run_id, record(folder, "versions", "last", sha256="ef01"))
    versions = [str(version_of(client, "versions", alias).version) for alias in ("best", "last")]
    assert versions == ["1", "2"]


def test_a_model_that_is_delivered_late_takes_no_alias_from_that_of_a_later_run(client: Any, folder: Path) -> None:
    experiment = client.get_experiment_by_name("dreamartist").experiment_id
    earlier, later = (client.create_run(experiment, start_time=start).info.run_id for start in (1000, 2000))
    send_model(later, record(folder, "order"))
    send_model(earlier, record(folder, "order", "last", "best", sha256="ef01"))
    assert version_of(client, "order", "last").run_id == later
    assert version_of(client, "order", "best").run_id == earlier


def test_a_try_that_was_interrupted_makes_no_second_version(
    client: Any, run_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ConnectionError

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr("mlflow.MlflowClient.set_registered_model_alias", fails)
        send_model(run_id, record(folder, "again"))
    send_model(run_id, record(folder, "again"))
    assert len(client.search_model_versions("name = 'again'")) == 1
    assert str(version_of(client, "again").version) == "1"


def test_a_model_whose_files_find_no_place_is_marked_as_failed(
    client: Any, run_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr("mlflow.MlflowClient.log_model_artifacts", full)
        send_model(run_id, record(folder, "full"))
    (model,) = client.search_logged_models([client.get_run(run_id).info.experiment_id], "name = 'full'")
    assert model.status == "FAILED"
    assert not client.search_model_versions("name = 'full'")


def test_a_model_that_a_store_does_not_take_is_kept_with_its_files_and_sent_later(
    client: Any, run_id: str, folder: Path, tmp_path: Path
) -> None:
    def away(_: Record) -> None:
        raise ConnectionError("Connection refused")

    kept = Outbox(tmp_path / "outbox" / run_id)
    delivery = Delivery(SimpleNamespace(), {}, kept, away)
    delivery.deliver(record(folder, "later"))
    (folder / "artifacts" / "concept.safetensors").write_bytes(b"of a later run")
    assert delivery.missing() == {"models": 1}
    (later,) = list(kept)
    send_model(run_id, later)
    model = client.get_logged_model(client.get_run(run_id).outputs.model_outputs[0].model_id)
    stored = Path(model.artifact_location.removeprefix("file://"))
    assert (stored / "artifacts" / "concept.safetensors").read_bytes() == b"concept"


def test_a_model_does_not_wait_for_a_store_that_is_away(folder: Path, tmp_path: Path) -> None:
    tried: list[str] = []

    def away(record: Record) -> None:
        tried.append(record.kind)
        raise ConnectionError("Connection refused")

    delivery = Delivery(SimpleNamespace(), {}, Outbox(tmp_path / "outbox" / "0123"), away)
    delivery.deliver(Record("tag", {"key": "a", "value": "b"}))
    delivery.deliver(record(folder, "away"))
    assert tried == ["tag"]


def test_secrets_are_not_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abra-cadabra")
    kept = model_record(folder, "fox", ("last",), "abcd", {"base_model": "abra-cadabra"})
    assert "abra-cadabra" not in str(kept)
