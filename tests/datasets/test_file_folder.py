"""A folder of files as one dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
from kedro.io import DatasetError
from kedro_datasets._typing import TablePreview

from dreamartist_pipeline.datasets.file_folder import FileFolderDataset
from dreamartist_pipeline.datasets.inputs import FileError
from refusals import says


def test_files_are_loaded_by_name(tmp_path: Path) -> None:
    dataset = FileFolderDataset(path=str(tmp_path / "a" / "export"))
    assert not dataset.exists()
    dataset.save({"lora/fox.safetensors": b"1", "README.txt": b"2"})
    assert dataset.load() == {"README.txt": b"2", "lora/fox.safetensors": b"1"}
    assert dataset.exists()


def test_a_save_leaves_nothing_of_an_earlier_one_and_nothing_beside(tmp_path: Path) -> None:
    dataset = FileFolderDataset(path=str(tmp_path / "export"))
    dataset.save({"old.txt": b"1"})
    dataset.save({"new.txt": b"2"})
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["export", "export/new.txt"]


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    dataset = FileFolderDataset(path=str(tmp_path / "export"))
    dataset.save({"old.txt": b"1"})
    with pytest.raises(DatasetError):
        dataset.save({"a": b"2", "a/b": b"3"})  # a file cannot be a folder too
    assert dataset.load() == {"old.txt": b"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_a_name_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, check=says(expected="/export", got=repr(name))):
        FileFolderDataset(path=str(tmp_path / "export")).save({name: b""})
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, check=says(expected="/none", got="none")):
        FileFolderDataset(path=str(tmp_path / "none")).load()


def test_the_preview_lists_the_files(tmp_path: Path) -> None:
    dataset = FileFolderDataset(path=str(tmp_path / "export"))
    dataset.save({"lora/fox.safetensors": bytes(1234), "README.txt": b"2"})
    shown = dataset.preview()
    assert (shown["columns"], shown["data"]) == (
        ["file", "bytes"],
        [["README.txt", "1"], ["lora/fox.safetensors", "1,234"]],
    )
    assert FileFolderDataset.preview.__annotations__["return"] is TablePreview  # kedro-viz compares the type
