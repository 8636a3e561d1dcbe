"""What a run leaves when its store fails or it is killed, and what the next run does with it: with real stores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreamartist_pipeline.tracking import MLflowTracker, delivery
from dreamartist_pipeline.tracking.left_runs import LeftRuns, store_name
from dreamartist_pipeline.tracking.servers import REQUEST_LIMITS
from dreamartist_pipeline.tracking.stores import keep_undelivered
from mlflow_servers import Gate, mlflow_server
from project_copy import empty_database
from tracking_stores import tracking_uri


@pytest.fixture(scope="module")
def server_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty database of MLflow; do not write into it."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    file.write_bytes(empty_database())
    return file


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try once; the machine may be shared, so that answers take long."""
    for name, value in REQUEST_LIMITS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 60.0)  # within a test, only the end tries again


@pytest.fixture
def gate(server_port: int) -> Iterator[Gate]:
    opened = Gate(server_port)
    with tracking_uri(opened.uri):
        keep_undelivered()
        yield opened
    opened.set("closed")


class Project:
    """A tracking folder, and one experiment in the current store."""

    def __init__(self, folder: Path, name: str) -> None:
        import mlflow

        self.folder = folder
        self.client = mlflow.MlflowClient()
        self.experiment_id = self.client.create_experiment(name)

    def runs(self) -> LeftRuns:
        import mlflow

        return LeftRuns(self.folder, mlflow.get_tracking_uri())

    @contextmanager
    def run(self) -> Iterator[str]:
        """Run as the hooks do, and yield the run's id."""
        import mlflow

        runs = self.runs()
        runs.finish(self.client, self.experiment_id)
        runs.announce()
        with mlflow.start_run(experiment_id=self.experiment_id, run_name="fox") as run:
            yield run.info.run_id
        runs.end()

    def finish(self) -> None:
        self.runs().finish(self.client, self.experiment_id)

    def outbox(self) -> list[str]:
        return [folder.name for folder in (self.folder / "outbox").glob("*")]


@pytest.fixture
def project(gate: Gate, tmp_path: Path) -> Project:
    return Project(tmp_path / "tracking", tmp_path.name)


def record_all() -> None:
    """Record one of each kind."""
    import mlflow

    tracker = MLflowTracker()
    for step in range(5):
        tracker.log_metrics({"loss": 1.0 / (step + 1)}, step=step)
    tracker.log_image(Image.new("RGB", (4, 4)), key="preview", step=2)
    tracker.log_image_file(Image.new("RGB", (4, 4), "blue"), "training/previews.png")
    tracker.set_tag("caption", "white background")
    mlflow.log_params({"steps": 5, "lr": 0.1})
    mlflow.log_dict({"a": 1}, "configuration.yaml")
    mlflow.flush_async_logging()
    mlflow.flush_artifact_async_logging()


def state_of(project: Project, run_id: str) -> dict[str, Any]:
    run = project.client.get_run(run_id)
    folders = [file.path for file in project.client.list_artifacts(run_id)]
    return {
        "status": run.info.status,
        "steps": [metric.step for metric in project.client.get_metric_history(run_id, "loss")],
        "params": run.data.params,
        "caption": run.data.tags.get("caption"),
        "files": sorted(folders),
        "images": len(project.client.list_artifacts(run_id, "images")),
    }


WHOLE = {
    "status": "FINISHED",
    "steps": [0, 1, 2, 3, 4],
    "params": {"steps": "5", "lr": "0.1"},
    "caption": "white background",
    "files": ["configuration.yaml", "images", "training"],
    "images": 2,
}


def test_with_a_server_that_answers_nothing_is_kept(project: Project) -> None:
    with project.run() as run_id:
        record_all()
    assert state_of(project, run_id) == WHOLE
    assert "delivery" not in project.client.get_run(run_id).data.tags
    assert project.outbox() == []
    assert list((project.folder / "running").iterdir()) == []


@pytest.mark.parametrize("failure", ["closed", "silent"])
def test_a_server_that_fails_in_mid_run_gets_the_rest_from_the_next_run(
    failure: Any, project: Project, gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    with monkeypatch.context() as patched, project.run() as run_id:
        mlflow.log_params({"steps": 5})
        patched.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        gate.set(failure)
        record_all()
    assert project.outbox() == [run_id]
    assert str(project.folder / "outbox" / run_id) in caplog.text
    gate.set("open")
    project.finish()
    assert state_of(project, run_id) == WHOLE
    assert project.client.get_run(run_id).data.tags["delivery"].startswith("complete")
    assert project.outbox() == []
    project.finish()
    assert state_of(project, run_id) == WHOLE
    assert "pa55word" not in caplog.text


def test_records_that_a_server_already_has_are_not_doubled(project: Project, gate: Gate) -> None:
    with project.run() as run_id:
        gate.set("closed")
        record_all()
    kept = project.folder / "outbox" / run_id
    copy = shutil.copytree(kept, project.folder / "copy")
    gate.set("open")
    project.finish()
    shutil.move(copy, kept)
    project.finish()
    assert state_of(project, run_id) == WHOLE


def test_a_run_with_holes_is_tagged_until_they_are_filled(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, project.run() as run_id:
        patched.setattr(MlflowArtifactsRepository, "log_artifact", full)
        record_all()
    run = project.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["delivery"] == "incomplete: 4 files not delivered"
    project.finish()
    assert state_of(project, run_id) == WHOLE
    assert project.client.get_run(run_id).data.tags["delivery"] == "complete: 4 files delivered later"


def test_the_outbox_of_a_run_that_goes_on_is_left_alone(project: Project, gate: Gate) -> None:
    with project.run() as run_id:
        gate.set("closed")
        MLflowTracker().set_tag("a", "b")
        gate.set("open")
        project.finish()
        assert project.outbox() == [run_id]


def test_a_run_that_the_server_does_not_know_is_named(
    project: Project, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with project.run() as run_id:
        gate.set("closed")
        MLflowTracker().set_tag("a", "b")
    gate.set("open")
    (project.folder / "outbox" / run_id).rename(project.folder / "outbox" / ("0" * 32))
    project.finish()
    assert "0" * 32 in caplog.messages[-1]
    assert project.outbox() == ["0" * 32]


def test_a_run_that_is_not_expected_is_left_to_mlflow(local: Project) -> None:
    run_id = local.client.create_run(local.experiment_id).info.run_id
    local.client.set_tag(run_id, "a", "b")
    local.client.set_terminated(run_id)
    run = local.client.get_run(run_id)
    assert (run.info.status, run.data.tags["a"]) == ("FINISHED", "b")
    assert local.outbox() == []


def test_a_run_that_is_continued_is_delivered_too(project: Project, gate: Gate) -> None:
    import mlflow

    with project.run() as run_id:
        pass
    runs = project.runs()
    runs.announce()
    with mlflow.start_run(run_id=run_id):
        gate.set("closed")
        MLflowTracker().set_tag("a", "b")
    runs.end()
    assert project.outbox() == [run_id]


def test_what_mlflow_refuses_is_named_and_stays(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    import mlflow

    with project.run() as run_id:
        mlflow.log_param("steps", 5)
        mlflow.log_param("steps", 6)
    assert project.client.get_run(run_id).info.status == "FINISHED"
    project.finish()
    assert "refuses 1 parameter" in caplog.messages[-1]
    assert project.client.get_run(run_id).data.tags["delivery"].startswith("incomplete: 1 parameter")


def test_the_outbox_of_another_store_waits_for_it(
    project: Project, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with project.run() as run_id:
        gate.set("closed")
        MLflowTracker().set_tag("a", "b")
    gate.set("open")
    LeftRuns(project.folder, "http://user:pa55word@elsewhere").finish(project.client, project.experiment_id)
    assert project.outbox() == [run_id]
    assert f"http://127.0.0.1:{gate.port}" in caplog.messages[-1] and "pa55word" not in caplog.text


def test_no_secret_is_in_the_run_or_the_outbox(project: Project, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    text = "http://user:pa55word@host hf_abcdef"
    with project.run() as run_id:
        mlflow.set_tag("before", text)
        mlflow.log_param("before", text)
        gate.set("closed")
        mlflow.set_tags({"after": text})
        mlflow.log_params({"after": text})
    kept = "".join(file.read_text() for file in (project.folder / "outbox").rglob("*.json*"))
    gate.set("open")
    data = project.client.get_run(run_id).data
    everything = kept + str(data.tags) + str(data.params)
    assert "pa55word" not in everything and "hf_abcdef" not in everything
    assert data.tags["before"] == data.params["before"] == "http://***@host ***"


# ------------------------------------------------------------------------------------------------- killed runs


@pytest.fixture
def local(database: Path, tmp_path: Path) -> Iterator[Project]:
    """Return a project with a database of its own."""
    (tmp_path / "tracking").mkdir()
    file = shutil.copy(database, tmp_path / "tracking" / "mlflow.db")
    with tracking_uri(f"sqlite:///{file}"):
        keep_undelivered()
        yield Project(tmp_path / "tracking", "test")


def killed_run(project: Project) -> str:
    """Return the id of a run whose process is gone: its lock is free, nothing else has happened."""
    import mlflow

    runs = project.runs()
    runs.announce(project.experiment_id)
    with mlflow.start_run(experiment_id=project.experiment_id, run_name="fox") as run:
        assert runs._lock is not None
        runs._lock.release()
        mlflow.tracking.fluent._active_run_stack.get().clear()
    return str(run.info.run_id)


def revived(project: Project, run_id: str) -> None:
    """Undo what leaving `with` has done."""
    project.client.update_run(run_id, "RUNNING")


def test_a_killed_run_is_closed_with_the_reason_at_the_next_start(local: Project) -> None:
    run_id = killed_run(local)
    revived(local, run_id)
    local.finish()
    run = local.client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert "killed" in run.data.tags["error"]
    assert list((local.folder / "running").iterdir()) == []


def test_a_killed_run_of_another_experiment_is_closed_too(local: Project) -> None:
    run_id = killed_run(local)
    revived(local, run_id)
    local.runs().finish(local.client, local.client.create_experiment("other"))
    assert local.client.get_run(run_id).info.status == "KILLED"


def test_a_run_whose_process_lives_is_left_running(local: Project) -> None:
    with local.run() as run_id:
        local.finish()
        assert local.client.get_run(run_id).info.status == "RUNNING"
    assert local.client.get_run(run_id).info.status == "FINISHED"


def test_a_copied_folder_says_nothing_of_runs_on_a_server(project: Project, tmp_path: Path) -> None:
    with project.run() as run_id:
        shutil.copytree(project.folder, tmp_path / "copy")
        other = Project.__new__(Project)
        other.folder, other.client, other.experiment_id = tmp_path / "copy", project.client, project.experiment_id
        other.finish()
        assert project.client.get_run(run_id).info.status == "RUNNING"


def test_a_database_has_one_name_wherever_its_project_is(tmp_path: Path) -> None:
    names = {store_name(f"sqlite:///{tmp_path}/{name}/mlflow.db", tmp_path / name) for name in ("a", "b")}
    assert names == {"sqlite:///mlflow.db"}
    assert store_name("http://user:pa55word@host", tmp_path) == "http://host"


def test_a_lock_says_who_holds_it(local: Project) -> None:
    runs = local.runs()
    runs.announce()
    (text,) = (local.folder / "running").glob("*.json")
    assert "process" in json.loads(text.read_text())["holder"]
    runs.end()
