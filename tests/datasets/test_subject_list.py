"""Tables of subjects, and folders of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.datasets.subject_list import SubjectListDataset
from dreamartist_pipeline.object_stores import ObjectStore
from refusals import says


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a folder `in`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def listed(source: str | None) -> list[dict[str, Any]]:
    return list(SubjectListDataset(path=".", source=source).load())


def test_cells_of_a_csv_file_are_texts_and_empty_ones_are_left_out(folder: Path) -> None:
    text = "subject,image, class_word ,training.seed\nfox,fox.png,animal,7\n007,/far/owl.png,,\n"
    (folder / "all.csv").write_text(text, encoding="utf-8-sig")
    assert listed("in/all.csv") == [
        {"subject": "fox", "image": "in/fox.png", "class_word": "animal", "training.seed": "7"},
        {"subject": "007", "image": "/far/owl.png"},
    ]


def test_cells_of_a_parquet_file_keep_their_types(folder: Path) -> None:
    table = {"subject": ["a", "b"], "image": ["a.png", "b.png"], "mask": [None, "m.png"], "training.num_steps": [7, 8]}
    pd.DataFrame(table).to_parquet(folder / "all.parquet")
    assert listed("in/all.parquet") == [
        {"subject": "a", "image": "in/a.png", "training.num_steps": 7},
        {"subject": "b", "image": "in/b.png", "mask": "in/m.png", "training.num_steps": 8},
    ]


def test_pictures_in_a_folder_are_subjects_by_their_names(folder: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (folder / name).write_bytes(b"")
    (folder / "c.png").mkdir()
    assert listed("in") == [{"subject": "a", "image": "in/a.JPG"}, {"subject": "b", "image": "in/b.png"}]


def no_file(folder: Path) -> None:
    pass


def written(text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "all.csv").write_bytes(data) and None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_file, says(expected="a table of subjects", got="no such file or folder")),
        (written("subject,picture\na,b.png\n"), says(got="no column image among subject, picture")),
        (written("subject,image,image\na,b.png,c.png\n"), says(expected="every column once", got="image")),
        (written("subject,image\na,b.png,c,d\n"), says(got="4 cells in row 1 under 2 names")),
        (written("subject,image\na,b.png\n,c.png\n"), says(got="subject without a value in row 2")),
        (written("subject,image\n"), says(expected="subjects in in/all.csv", got="none")),
        (written("subject,image\na,b.png\na,c.png\n"), says(expected="once", got="a")),
        (written('subject,image\n"a,b.png\n'), says(expected="in/all.csv as a table")),
        (written("subject,image\nä,b.png\n".encode("latin-1")), says(expected="UTF-8")),
        (written(b""), says(got="no column subject and no column image")),
    ],
)
def test_what_is_no_table_of_subjects_is_refused(folder: Path, make: Callable[[Path], None], message: Any) -> None:
    make(folder)
    with pytest.raises(FileError, check=message):
        listed("in/all.csv")


def test_paths_are_those_of_the_base_folder_wherever_the_command_is_called(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "all.csv").write_text("subject,image,mask\nfox,fox.png,~/mask.png\n")
    monkeypatch.setenv("HOME", "/far")
    monkeypatch.chdir(folder)
    for source in (str(folder / "all.csv"), "in/all.csv"):
        (row,) = SubjectListDataset(path=str(folder.parent), source=source).load()
        assert (row["image"], row["mask"]) == ("in/fox.png", "/far/mask.png")


def test_two_pictures_of_one_name_are_refused(folder: Path) -> None:
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    with pytest.raises(FileError, check=says(expected="every subject in in once", got="a")):
        listed("in")


def test_cells_of_other_types_are_refused(folder: Path) -> None:
    table = {"subject": ["a"], "image": ["a.png"], "made": [pd.Timestamp("2026-01-02")]}
    pd.DataFrame(table).to_parquet(folder / "all.parquet")
    with pytest.raises(FileError, check=says(got="in the column made")):
        listed("in/all.parquet")


def test_other_kinds_of_files_empty_folders_and_nothing_are_refused(folder: Path) -> None:
    (folder / "all.parquet").write_bytes(b"no parquet")
    (folder / "all.txt").write_text("a")
    for source, part in (("in/all.txt", "another kind of file"), ("in/all.parquet", "Parquet")):
        with pytest.raises(FileError, check=says(got=part)):
            listed(source)
    (folder / "empty").mkdir()
    with pytest.raises(FileError, check=says(expected="in/empty", got="none")):
        listed("in/empty")
    with pytest.raises(FileError, check=says(got="none", remedy="kedro personalize SUBJECTS")):
        listed(None)


def test_pictures_of_a_source_in_a_store_are_found_there_by_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DREAMARTIST_CACHE", str(tmp_path))
    store = ObjectStore("memory://subjects")
    store.folder("pictures").write("fox.png", b"")
    store.folder("in").write("table.csv", b"subject,image,mask\nowl,../all/owl.png,s3://other/mask.png\nfox,/a.png,\n")
    assert listed("memory://subjects/pictures/") == [{"subject": "fox", "image": "memory://subjects/pictures/fox.png"}]
    assert listed("memory://subjects/in/table.csv") == [
        {"subject": "owl", "image": "memory://subjects/all/owl.png", "mask": "s3://other/mask.png"},
        {"subject": "fox", "image": "/a.png"},
    ]
