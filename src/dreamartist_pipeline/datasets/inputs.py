"""What datasets of input files share: their error, and a save that refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from kedro.io import AbstractDataset, DatasetError

from dreamartist_pipeline.errors import InputError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif", ".avif")

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


def place_of(file: Path) -> str:
    """Return a remark for a missing file that exists at the same path from a folder above the working directory."""
    folder = Path.cwd()
    for above in folder.parents if file.is_relative_to(folder) else ():
        if (meant := above / file.relative_to(folder)).exists():
            return f"; paths begin in the working directory, so that it is {os.path.relpath(meant)}"
    return ""
