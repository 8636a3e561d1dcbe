"""SQLite databases of MLflow: which file a URI names, whether it can be used, and where its runs have their files."""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.tracking.delivery import reason_of

PROBE_S = 5.0
"""How long a tracking store may take to answer before the run."""
OTHER_STORE = "set MLFLOW_TRACKING_URI to another store, such as sqlite:////FOLDER/mlflow.db"
_SCHEME = "sqlite:///"
_PROBE_BYTES = 2**20

log = logging.getLogger(__name__)


def database_file(tracking_uri: str) -> Path | None:
    """Return the file of an SQLite database; None for other stores and for databases in memory."""
    if not tracking_uri.startswith(_SCHEME):
        return None
    path = unquote(tracking_uri.removeprefix(_SCHEME).partition("?")[0])
    return Path(path).absolute() if path and path != ":memory:" else None


def check_database(file: Path) -> None:
    """Check that a database can be written: its folder, its contents, and that no other process has locked it.

    Raises:
        InputError: it cannot.
    """
    _check_folder(file.parent)
    if not file.exists() or not file.stat().st_size:
        return
    try:
        connection = sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=PROBE_S)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA user_version = {version}")  # writes: a lock alone is given to a read-only file
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise _unusable(file, error) from error


def _check_folder(folder: Path) -> None:
    """Write a file for a moment: it needs a folder that can be written, and free space.

    Raises:
        InputError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        raise InputError(
            expected=f"a folder for MLflow's database in which 1 MiB can be written: {folder}",
            got=f"{error.strerror}",
            remedy=f"make it writable or free space, or {OTHER_STORE}",
        ) from error


def _unusable(file: Path, error: sqlite3.Error) -> InputError:
    expected = f"MLflow's database {file}, ready to be written within {PROBE_S:.0f} s"
    if "locked" in str(error):
        remedy = f"end the process that has locked it (fuser {file}), or {OTHER_STORE}"
    elif "readonly" in str(error) or "unable to open" in str(error):
        remedy = f"make the file writable, or {OTHER_STORE}"
    else:
        remedy = f"restore it from a copy, or move it away (mv {file} {file}.damaged): the next run makes a new one"
    return InputError(expected=expected, got=str(error), remedy=remedy)


def open_database(file: Path, tracking_uri: str) -> None:
    """Let MLflow create its tables, or check them. One without a run whose tables are incomplete is moved aside.

    Raises:
        InputError: the tables of a database with runs are not those of this MLflow.
    """
    try:
        _open(tracking_uri)
    except Exception as error:
        if _holds_runs(file):
            raise InputError(
                expected=f"the tables of this version of MLflow in {file}",
                got=reason_of(error),
                remedy=f"copy the file, then: mlflow db upgrade {_SCHEME}{file}; or {OTHER_STORE}",
            ) from error
        aside = file.with_name(f"{file.name}.incomplete-{time.strftime('%Y%m%d-%H%M%S')}")
        _forget(tracking_uri)
        file.replace(aside)
        log.warning("%s was incomplete and without a run (%s). It is now %s.", file, reason_of(error), aside.name)
        _open(tracking_uri)


def _open(tracking_uri: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri).search_experiments(max_results=1)


def _forget(tracking_uri: str) -> None:
    """Close MLflow's connections to a database."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    engine = SqlAlchemyStore._engine_map.pop(tracking_uri, None)
    if engine is not None:
        engine.dispose()


def _holds_runs(file: Path) -> bool:
    """Return whether a run may be in the database; True if that cannot be read."""
    try:
        connection = sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=PROBE_S)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            kept = [table for table in ("runs", "_alembic_tmp_runs") if table in tables]
            return any(connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in kept)
        finally:
            connection.close()
    except sqlite3.Error:
        return True


def follow_location(tracking_uri: str, experiment_name: str, location: str, project: Path) -> None:
    """Let the experiment of a moved or copied project have its files in the project's own folder.

    MLflow keeps absolute paths, of the experiment, its runs and its models, and its API cannot change them. They are
    changed in its tables, through its own classes, for a location that is the same one relative to another folder.

    Args:
        tracking_uri: of a database.
        experiment_name: its experiment.
        location: of its files, as a `file:` URI below the project.
        project: root of the project.
    """
    from mlflow import MlflowClient
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
    from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlLoggedModel, SqlRun

    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(experiment_name)
    relative = location.removeprefix(project.as_uri())
    if experiment is None or location in (experiment.artifact_location, relative):
        return
    earlier = experiment.artifact_location
    if not earlier.endswith(relative):  # a place that a user has chosen
        return
    number = int(experiment.experiment_id)
    store: Any = client._tracking_client.store
    with store.ManagedSessionMaker(read_only=False) as session:
        session.query(SqlExperiment).filter_by(experiment_id=number).update({"artifact_location": location})
        for rows, column in (
            (session.query(SqlRun).filter_by(experiment_id=number), "artifact_uri"),
            (session.query(SqlLoggedModel).filter_by(experiment_id=number), "artifact_location"),
            (session.query(SqlModelVersion), "storage_location"),
        ):
            for row in rows:
                if (place := getattr(row, column) or "").startswith(earlier):
                    setattr(row, column, location + place.removeprefix(earlier))
    log.info("The files of MLflow's runs are now in %s; they were in %s.", location, earlier)
