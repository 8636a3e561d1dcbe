"""The base model by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from kedro.io import DatasetError

from dreamartist_pipeline.datasets.base_model import BaseModelDataset
from dreamartist_pipeline.datasets.inputs import FileError
from refusals import says


def test_a_folder_loads_to_its_path(tmp_path: Path) -> None:
    assert BaseModelDataset(path=str(tmp_path)).load() == str(tmp_path)


def test_a_hub_id_loads_as_it_is() -> None:
    dataset = BaseModelDataset(path="hub:owner/name")
    assert dataset.exists()
    assert dataset.load() == "hub:owner/name"


def test_a_missing_folder_is_refused_before_any_library_is_loaded(tmp_path: Path) -> None:
    dataset = BaseModelDataset(path=str(tmp_path / "none"))
    assert not dataset.exists()
    with pytest.raises(FileError, check=says(expected="/none", got="no such folder", remedy="base_model=")):
        dataset.load()


def test_a_base_model_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="read-only"):
        BaseModelDataset(path=str(tmp_path)).save(object())  # type: ignore[arg-type]
