"""Files that users name."""

from __future__ import annotations

from pathlib import Path

import pytest
from kedro.io import DatasetError

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.datasets.user_files import (
    UserFilesDataset,
    UserFolderDataset,
    UserPicturesDataset,
    folder_files,
)
from refusals import says


def test_a_path_is_relative_to_the_root_absolute_or_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cat.pt").write_bytes(b"1")
    monkeypatch.setenv("HOME", str(tmp_path))
    for root, path in ((tmp_path, "cat.pt"), (Path("/"), str(tmp_path / "cat.pt")), (Path("/nowhere"), "~/cat.pt")):
        files = UserFilesDataset(path=str(root), files=path).load()
        assert {name: read() for name, read in files.items()} == {path: b"1"}


def test_files_are_named_as_the_parameters_have_them_and_read_when_asked_for(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    files = UserFilesDataset(path=str(tmp_path), files=[("a",), (), {"pt1": ("b", "c")}]).load()
    (tmp_path / "b").write_text("later")
    assert {name: read() for name, read in files.items()} == {"a": b"a", "b": b"later", "c": b"c"}


@pytest.mark.parametrize(("path", "got"), [("none.pt", "none"), (".", "a folder")])
def test_a_missing_file_is_refused_with_its_path(tmp_path: Path, path: str, got: str) -> None:
    dataset = UserFilesDataset(path=str(tmp_path), files=[path])
    assert not dataset.exists()
    with pytest.raises(FileError, check=says(expected=str(tmp_path / path), got=got)):
        dataset.load()


def test_a_missing_folder_is_refused_with_its_path(tmp_path: Path) -> None:
    dataset = UserFolderDataset(path=str(tmp_path), folder="nowhere")
    assert not dataset.exists()
    with pytest.raises(FileError, check=says(expected="/nowhere", got="none")):
        dataset.load()


def test_no_path_gives_no_files(tmp_path: Path) -> None:
    pictures = UserPicturesDataset(path="/", sources=[])
    for dataset in (UserFilesDataset(path="/", files=None), UserFolderDataset(path="/", folder=None), pictures):
        assert dataset.exists()
        assert dataset.load() == {}


def test_a_folder_gives_its_files_or_those_of_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_bytes(b"")
    assert list(folder_files(tmp_path)) == ["cfg.yaml"]
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "ckpts" / "unet-1.safetensors").write_bytes(b"2")
    files = UserFolderDataset(path=str(tmp_path.parent), folder=tmp_path.name).load()
    assert {name: read() for name, read in files.items()} == {"unet-1.safetensors": b"2"}


def test_files_of_users_are_never_written() -> None:
    pictures = UserPicturesDataset(path="/", sources=[])
    for dataset in (UserFilesDataset(path="/", files=None), UserFolderDataset(path="/", folder=None), pictures):
        with pytest.raises(DatasetError, match="read-only"):
            dataset.save({})  # type: ignore[arg-type]


def test_pictures_are_files_and_those_directly_in_folders(tmp_path: Path) -> None:
    (tmp_path / "more" / "deeper.png").mkdir(parents=True)
    for name in ("cat", "more/b.JPG", "more/a.png", "more/a.txt"):
        (tmp_path / name).write_text(name)
    dataset = UserPicturesDataset(path=str(tmp_path), sources=["cat", "more"])
    assert dataset.exists()
    more = tmp_path / "more"
    assert [(path, read()) for path, read in dataset.load().items()] == [
        ("cat", b"cat"),
        (f"{more}/a.png", b"more/a.png"),
        (f"{more}/b.JPG", b"more/b.JPG"),
    ]


def test_a_missing_picture_and_a_folder_without_pictures_are_refused(tmp_path: Path) -> None:
    missing = UserPicturesDataset(path=str(tmp_path), sources="cat.png")
    assert not missing.exists()
    with pytest.raises(FileError, check=says(expected="cat.png", got="none")):
        missing.load()
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(FileError, check=says(expected=str(tmp_path), got="none")):
        UserPicturesDataset(path="/", sources=str(tmp_path)).load()
