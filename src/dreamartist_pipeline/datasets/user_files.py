"""Files that users name in parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.user_files import UserFiles


class UserFilesDataset(AbstractDataset[None, UserFiles]):
    """Files that parameters name: the path as it is written there -> what reads the file.

    Args:
        path: where relative paths begin.
        files: paths, within lists and mappings as the parameters have them; None for no file.
    """

    def __init__(self, *, path: str, files: Any, metadata: dict[str, Any] | None = None) -> None:
        self._root, self._files = Path(path), tuple(_paths(files))
        self.metadata = metadata

    def load(self) -> UserFiles:
        """Return what reads each file.

        Raises:
            InputError: there is no such file.
        """
        return {path: _reader(resolved(path, self._root)) for path in self._files}

    def save(self, data: None) -> None:
        """Refuse: they are input.

        Raises:
            DatasetError: always.
        """
        raise DatasetError("the user's own files are only read")

    def _exists(self) -> bool:
        return all(resolved(path, self._root).is_file() for path in self._files)

    def _describe(self) -> dict[str, Any]:
        return {"files": self._files}


class UserFolderDataset(AbstractDataset[None, UserFiles]):
    """The files of a folder that a parameter names: file name -> what reads the file.

    Args:
        path: where a relative path begins.
        folder: see `folder_files`; None for no folder, and so no files.
    """

    def __init__(self, *, path: str, folder: str | None, metadata: dict[str, Any] | None = None) -> None:
        self._folder = None if folder is None else resolved(folder, Path(path))
        self.metadata = metadata

    def load(self) -> UserFiles:
        """Return what reads each file.

        Raises:
            InputError: there is no such folder.
        """
        return {} if self._folder is None else folder_files(self._folder)

    def save(self, data: None) -> None:
        """Refuse: they are input.

        Raises:
            DatasetError: always.
        """
        raise DatasetError("the user's own files are only read")

    def _exists(self) -> bool:
        return self._folder is None or self._folder.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"folder": self._folder and self._folder.as_posix()}


def folder_files(folder: Path) -> UserFiles:
    """Return name -> what reads it for the files that lie directly in a folder; in its `ckpts`, where it has one.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(
            expected=f"a folder at {folder}", got=f"{'a file' if folder.is_file() else 'none'}", remedy="correct it"
        )
    inner = folder / "ckpts"
    return {
        file.name: _reader(file) for file in sorted((inner if inner.is_dir() else folder).iterdir()) if file.is_file()
    }


def resolved(path: str, root: Path) -> Path:
    """Return where a path leads that is relative to the root, absolute, or from the home folder (`~/`)."""
    return root / Path(path).expanduser()


def _reader(file: Path) -> partial[bytes]:
    if not file.is_file():
        raise InputError(
            expected=f"a file at {file}", got=f"{'a folder' if file.is_dir() else 'none'}", remedy="correct the path"
        )
    return partial(Path.read_bytes, file)


def _paths(value: Any) -> Iterator[str]:
    """Yield the paths in nested lists and mappings, in their order."""
    if isinstance(value, str):
        yield value
    elif value is not None:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _paths(item)
