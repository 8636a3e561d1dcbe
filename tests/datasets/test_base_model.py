"""The base model by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from kedro.io import DatasetError

from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.datasets.base_model import BaseModelDataset
from dreamartist_pipeline.datasets.inputs import FileError
from refusals import says


def test_folders_files_and_hub_ids_load_as_locations(tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    file.touch()
    assert BaseModelDataset(path=str(tmp_path)).load() == ModelLocation(str(tmp_path))
    dataset = BaseModelDataset(path="hub:owner/name", vae={"path": str(file)}, config={"path": str(tmp_path)})
    assert dataset.exists()
    assert dataset.load() == ModelLocation("hub:owner/name", str(file), str(tmp_path))


@pytest.mark.parametrize(
    ("argument", "setting"), [("path", "base_model"), ("vae", "vae"), ("config", "base_model_config")]
)
def test_what_is_missing_is_refused_before_any_library_is_loaded(tmp_path: Path, argument: str, setting: str) -> None:
    missing = str(tmp_path / "none")
    others = {} if argument == "path" else {argument: {"path": missing}}
    dataset = BaseModelDataset(path=missing if argument == "path" else str(tmp_path), **others)
    assert not dataset.exists()
    with pytest.raises(FileError, check=says(expected="/none", got="no such", remedy=f"{setting}=")):
        dataset.load()


def test_a_base_model_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="read-only"):
        BaseModelDataset(path=str(tmp_path)).save(object())  # type: ignore[arg-type]
