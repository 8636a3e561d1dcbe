"""MLflow's SQLite database: damaged, locked, half-made, not writable, moved."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.tracking import databases
from dreamartist_pipeline.tracking.databases import check_database, database_file, follow_location, open_database
from refusals import says
from tracking_stores import tracking_uri

LOCATION = "data/09_tracking/artifacts"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project with a database that has one run; do not write into it."""
    import mlflow

    project = tmp_path_factory.mktemp("project")
    file = project / "data/09_tracking/mlflow.db"
    with tracking_uri(f"sqlite:///{file}"):
        client = mlflow.MlflowClient()
        number = client.create_experiment("dreamartist", artifact_location=(project / LOCATION).as_uri())
        run = client.create_run(number)
        client.set_terminated(run.info.run_id)
        model = client.create_logged_model(number, "fox", source_run_id=run.info.run_id)
        client.create_registered_model("fox")
        client.create_model_version("fox", f"models:/{model.model_id}", await_creation_for=0)
    return project


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


@pytest.fixture
def file(project: Path) -> Path:
    return project / "data/09_tracking/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a/my%20b/mlflow.db?timeout=3", "/a/my b/mlflow.db"),
        ("sqlite:///m.db", f"{Path.cwd()}/m.db"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://host", None),
    ],
)
def test_a_uri_names_its_file(uri: str, path: str | None) -> None:
    assert database_file(uri) == (None if path is None else Path(path))


def test_a_database_in_order_and_one_that_does_not_exist_pass(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    check_database(file)
    check_database(tmp_path / "new/folder/mlflow.db")
    assert file.read_bytes() == before
    assert [each.name for each in file.parent.iterdir()] == ["mlflow.db"]


def test_random_bytes_are_no_database(file: Path) -> None:
    file.write_bytes(os.urandom(5000))
    with pytest.raises(InputError, check=says(expected=str(file), got="not a database", remedy=f"mv {file}")):
        check_database(file)


def test_a_cut_database_is_refused(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(4000) + content[4100:])
    with pytest.raises(InputError, check=says(expected=str(file), remedy=f"mv {file}")):
        check_database(file)


def test_a_locked_database_is_given_up_in_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "PROBE_S", 0.1)
    other = sqlite3.connect(file)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(InputError, check=says(got="locked", remedy="fuser")):
        check_database(file)
    other.close()


@pytest.fixture
def immutable(file: Path) -> Iterator[Path]:
    """Make the database immutable: permissions do not count for root."""
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", file], check=False).returncode:
        pytest.skip("needs chattr +i, so root and a file system that knows it")
    yield file
    subprocess.run(["chattr", "-i", file], check=True)


def test_a_read_only_database_is_refused(immutable: Path) -> None:
    with pytest.raises(InputError, check=says(expected=str(immutable), got="readonly", remedy="writable")):
        check_database(immutable)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, check=says(expected=f"{tmp_path}/file", remedy="MLFLOW_TRACKING_URI")):
        check_database(tmp_path / "file" / "mlflow.db")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of a file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs root, to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_refused(small_disk: Path) -> None:
    (small_disk / "filled").write_bytes(bytes(2**19))
    with pytest.raises(InputError, check=says(expected=str(small_disk), got="space", remedy="free space")):
        check_database(small_disk / "mlflow.db")
    assert [each.name for each in small_disk.iterdir()] == ["filled"]


def half_made(file: Path, *statements: str) -> None:
    connection = sqlite3.connect(file)
    for statement in (
        "CREATE TABLE alembic_version (version_num VARCHAR(32))",
        "INSERT INTO alembic_version VALUES ('451aebb31d03')",
        "CREATE TABLE experiments (x)",
        "CREATE TABLE _alembic_tmp_metrics (x)",
        *statements,
    ):
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_half_made_database_without_a_run_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mlflow.db"
    half_made(file)
    open_database(file, f"sqlite:///{file}")
    (aside,) = tmp_path.glob("mlflow.db.incomplete-*")
    assert aside.name in caplog.text
    open_database(file, f"sqlite:///{file}")
    assert len(list(tmp_path.glob("mlflow.db.incomplete-*"))) == 1


def test_a_half_made_database_with_runs_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    half_made(file, "CREATE TABLE runs (x)", "INSERT INTO runs VALUES (1)")
    with pytest.raises(InputError, check=says(expected=str(file), remedy="mlflow db upgrade")):
        open_database(file, f"sqlite:///{file}")
    assert file.exists()


def location_of(project: Path) -> tuple[str, str]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project}/data/09_tracking/mlflow.db")
    experiment = client.get_experiment_by_name("dreamartist")
    (run,) = client.search_runs([experiment.experiment_id])
    return experiment.artifact_location, run.info.artifact_uri


def test_a_copied_project_has_its_files_in_its_own_folder(made: Path, project: Path) -> None:
    uri, location = f"sqlite:///{project}/data/09_tracking/mlflow.db", (project / LOCATION).as_uri()
    follow_location(uri, "dreamartist", location, project)
    experiment, run = location_of(project)
    assert experiment == location
    assert run.startswith(f"{location}/")
    assert location_of(made)[0] == (made / LOCATION).as_uri()


def test_the_models_of_a_copied_project_are_in_its_own_folder(project: Path) -> None:
    import mlflow

    uri, location = f"sqlite:///{project}/data/09_tracking/mlflow.db", (project / LOCATION).as_uri()
    follow_location(uri, "dreamartist", location, project)
    client = mlflow.MlflowClient(uri)
    (model,) = client.search_logged_models([client.get_experiment_by_name("dreamartist").experiment_id])
    assert model.artifact_location.startswith(f"{location}/")
    assert client.get_model_version_download_uri("fox", "1").startswith(f"{location}/")


def test_another_place_that_a_user_has_chosen_stays(project: Path) -> None:
    before = location_of(project)
    follow_location(f"sqlite:///{project}/data/09_tracking/mlflow.db", "dreamartist", "s3://bucket/runs", project)
    assert location_of(project) == before
