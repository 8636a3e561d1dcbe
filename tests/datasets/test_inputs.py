"""The error of datasets."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamartist_pipeline.datasets.base_model import BaseModelDataset
from dreamartist_pipeline.datasets.image import ReferenceImageDataset
from dreamartist_pipeline.datasets.inputs import FileError, ReadOnlyDataset
from dreamartist_pipeline.datasets.prompts import PromptDatabaseDataset
from dreamartist_pipeline.datasets.user_files import UserFilesDataset, UserFolderDataset
from refusals import says


class _Missing(ReadOnlyDataset[bytes]):
    error = FileError(expected="a file at a.png", got="none", remedy="correct the path")

    def load(self) -> bytes:
        raise self.error

    def _describe(self) -> dict[str, Any]:
        return {}


def test_kedro_passes_a_file_error_on_unchanged() -> None:
    with pytest.raises(FileError) as raised:
        _Missing().load()
    assert raised.value is _Missing.error
    assert str(raised.value) == "expected a file at a.png; got none; correct the path"


def test_a_file_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(_Missing.error))
    assert (type(error), str(error), error.remedy) == (FileError, str(_Missing.error), "correct the path")


@pytest.mark.parametrize(
    "dataset",
    [
        lambda path: ReferenceImageDataset(filepath=path),
        lambda path: PromptDatabaseDataset(filepath=path),
        lambda path: BaseModelDataset(path=path),
        lambda path: UserFilesDataset(path="", files=path),
        lambda path: UserFolderDataset(path="", folder=path),
    ],
)
def test_a_path_from_the_project_in_a_sub_folder_is_answered_with_the_one_from_there(
    dataset: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/cat").mkdir(parents=True)
    (tmp_path / "docs/deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs/deep")
    with pytest.raises(FileError, check=says(expected="docs/deep/data/cat", remedy="../../data/cat")):
        dataset(str(tmp_path / "docs/deep/data/cat")).load()
    with pytest.raises(FileError) as raised:
        dataset(str(tmp_path / "docs/deep/data/dog")).load()
    assert ".." not in raised.value.remedy
