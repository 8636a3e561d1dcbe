"""The error of datasets."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from dreamartist_pipeline.datasets.inputs import FileError, ReadOnlyDataset


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
