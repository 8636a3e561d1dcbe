"""What datasets of input files share: their error, and a save that refuses."""

from __future__ import annotations

from typing import TypeVar

from kedro.io import AbstractDataset, DatasetError

from dreamartist_pipeline.errors import InputError

_Loaded = TypeVar("_Loaded")


class FileError(InputError, DatasetError):
    """A file or folder that cannot be used; Kedro does not wrap it, because it is a DatasetError."""


class ReadOnlyDataset(AbstractDataset[None, _Loaded]):
    """Base class of datasets that are never written."""

    def save(self, data: None) -> None:
        """Refuse.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(f"{self} is read-only")
