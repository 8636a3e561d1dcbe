"""Files that users name, and looking for a result."""

from __future__ import annotations

from pathlib import Path

import pytest
from kedro.io import DatasetError

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.datasets.user_files import PlaceDataset, UserFilesDataset


def test_a_path_is_relative_to_the_root_absolute_or_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cat.pt").write_bytes(b"1")
    files = UserFilesDataset(path=str(tmp_path)).load()
    assert files.read("cat.pt") == files.read(str(tmp_path / "cat.pt")) == b"1"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert UserFilesDataset(path="/nowhere").load().read("~/cat.pt") == b"1"


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    files = UserFilesDataset(path=str(tmp_path)).load()
    with pytest.raises(InputError, match="expected a file at .*none.pt; got none"):
        files.read("none.pt")
    with pytest.raises(InputError, match="expected a file at .*; got a folder"):
        files.read(".")
    with pytest.raises(InputError, match="expected a folder at .*nowhere; got none"):
        files.names("nowhere")


def test_a_folder_gives_its_files_or_those_of_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_bytes(b"")
    files = UserFilesDataset(path=str(tmp_path)).load()
    assert list(files.names(".")) == ["cfg.yaml"]
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "ckpts" / "unet-1.safetensors").write_bytes(b"2")
    names = files.names(".")
    assert list(names) == ["unet-1.safetensors"]
    assert files.read(names["unet-1.safetensors"]) == b"2"


def test_a_place_is_the_path_where_there_is_a_file(tmp_path: Path) -> None:
    place = PlaceDataset(filepath=str(tmp_path / "concept.safetensors"))
    assert place.load() is None
    (tmp_path / "concept.safetensors").touch()
    assert place.load() == f"{tmp_path}/concept.safetensors"


def test_nothing_is_saved_through_them(tmp_path: Path) -> None:
    for dataset in (UserFilesDataset(path=str(tmp_path)), PlaceDataset(filepath=str(tmp_path / "x"))):
        assert dataset.exists()
        with pytest.raises(DatasetError):
            dataset.save("x")
