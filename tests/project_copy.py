"""A copy of the project in a folder of its own, so that runs of tests touch no user's data."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw

PROJECT = Path(__file__).resolve().parents[1]
_FOLDERS, _FILES = ("conf", "src", "notebooks"), ("pyproject.toml", ".telemetry")


def copy_project(folder: Path, base_model: Path) -> Path:
    """Copy code, configuration and notebooks, and add inputs, see `add_inputs`.

    The local configuration is left out, and so are the project's own data; its MLflow database is a new one.
    """
    for name in _FOLDERS:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info"))
    shutil.rmtree(folder / "conf" / "local")
    (folder / "conf" / "local").mkdir()
    for name in _FILES:
        shutil.copy(PROJECT / name, folder)
    (folder / "data" / "09_tracking").mkdir(parents=True)
    (folder / "data" / "09_tracking" / "mlflow.db").write_bytes(empty_database())
    add_inputs(folder, base_model)
    return folder


@functools.cache
def empty_database() -> bytes:
    """Return a new database of MLflow, which takes seconds to make."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def add_inputs(folder: Path, base_model: Path) -> None:
    """Add a base model (`tiny`), prompts (`prompts.parquet`) and the picture of a red button (`button.png`)."""
    shutil.copytree(base_model, folder / "tiny")
    pd.DataFrame({"prompt": ["a red cat", "a blue dog", "a green bird"]}).to_parquet(folder / "prompts.parquet")
    picture = Image.new("RGB", (48, 40), "white")
    ImageDraw.Draw(picture).ellipse((8, 4, 40, 36), fill="red")
    picture.save(folder / "button.png")
