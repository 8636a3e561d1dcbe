"""A copy of the project without pictures and models, for runs that end early."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def bare_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder; it has an empty sub-folder `notebooks`."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("conf", "src"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", ".telemetry"):
        shutil.copy(PROJECT / name, folder)
    (folder / "conf" / "local").mkdir(exist_ok=True)
    for name in ("data/09_tracking", "data/01_raw/base_model", "notebooks"):
        (folder / name).mkdir(parents=True)
    (folder / "data/01_raw/prompts").mkdir()
    (folder / "data/01_raw/prompts/embedded_world.parquet").touch()
    return folder
