"""Files that users name in parameters, and whether a result is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from dreamartist_pipeline.core.errors import InputError


class UserFiles:
    """Reads files by the paths that users write: relative to a root, absolute, or from the home folder (`~/`)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str) -> bytes:
        """Return a file's bytes.

        Raises:
            InputError: there is no such file.
        """
        file = self._resolve(path)
        if not file.is_file():
            came = "a folder" if file.is_dir() else "none"
            raise InputError(f"expected a file at {file}; got {came}; correct the path")
        return file.read_bytes()

    def names(self, path: str) -> dict[str, str]:
        """Return name -> path of the files that lie directly in a folder; in its `ckpts`, where it has one.

        Raises:
            InputError: there is no such folder.
        """
        folder = self._resolve(path)
        if not folder.is_dir():
            raise InputError(
                f"expected a folder at {folder}; got {'a file' if folder.is_file() else 'none'}; correct it"
            )
        inner = folder / "ckpts"
        found = sorted((inner if inner.is_dir() else folder).iterdir())
        return {file.name: str(file) for file in found if file.is_file()}

    def _resolve(self, path: str) -> Path:
        return self._root / Path(path).expanduser()


class UserFilesDataset(AbstractDataset[None, UserFiles]):
    """Loads to a `UserFiles`; which files are read is left to the node whose parameters name them.

    Args:
        path: where relative paths begin.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> UserFiles:
        """Return what reads them."""
        return UserFiles(self._path)

    def save(self, data: None) -> None:
        """Refuse: they are input.

        Raises:
            DatasetError: always.
        """
        raise DatasetError("the user's own files are only read")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path.as_posix()}


class PlaceDataset(AbstractDataset[None, str | None]):
    """Loads to the path of a file that is there, or to None: for nodes that must not replace it unasked.

    Args:
        filepath: the file.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> str | None:
        """Return the path when there is a file."""
        return self._filepath.as_posix() if self._filepath.exists() else None

    def save(self, data: None) -> None:
        """Refuse: another dataset writes the file.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(f"{self._filepath} is written by another dataset; here it is only looked for")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
