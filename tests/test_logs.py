"""Where the logging of a run is configured from."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from dreamartist_pipeline.hooks import logs

LOGGING = "version: 1\nroot: {level: ERROR}\n"


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the configurations that are applied, which would change the logging of the tests."""
    configurations: list[dict[str, Any]] = []
    monkeypatch.delenv("KEDRO_LOGGING_CONFIG", raising=False)
    monkeypatch.setattr(logs, "configure_logging", configurations.append)
    return configurations


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project with conf/logging.yml, and work in a sub-folder of it."""
    (tmp_path / "pyproject.toml").write_text("[tool.kedro]\npackage_name = 'x'\n")
    for folder in ("conf", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "conf" / "logging.yml").write_text(LOGGING)
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def test_a_run_from_a_sub_folder_logs_as_from_the_root(project: Path, applied: list[dict[str, Any]]) -> None:
    logs.configure_logs(None)
    assert applied == [{"version": 1, "root": {"level": "ERROR"}}]


def test_kedro_itself_configures_a_run_from_the_root(
    project: Path, applied: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    logs.configure_logs(None)
    assert applied == []


def test_the_environment_variable_of_kedro_is_respected(
    project: Path, applied: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDRO_LOGGING_CONFIG", "mine.yml")
    logs.configure_logs(str(project / "conf"))
    assert applied == []


def test_the_configuration_may_be_an_archive(project: Path, applied: list[dict[str, Any]]) -> None:
    with tarfile.open(project / "conf.tar.gz", "w:gz") as archive:
        archive.add(project / "conf", "conf")
    logs.configure_logs(str(project / "conf.tar.gz"))
    assert applied == [{"version": 1, "root": {"level": "ERROR"}}]


def test_a_configuration_without_logging_leaves_it_as_it_is(project: Path, applied: list[dict[str, Any]]) -> None:
    with tarfile.open(project / "empty.tar.gz", "w:gz") as archive:
        archive.add(project / "pyproject.toml", "conf/parameters.yml")
    for source in ("notebooks", "empty.tar.gz", "pyproject.toml", "missing"):
        logs.configure_logs(str(project / source))
    assert applied == []
