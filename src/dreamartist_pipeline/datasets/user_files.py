"""Files that users name in parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dreamartist_pipeline.datasets.inputs import PICTURE_SUFFIXES, FileError, ReadOnlyDataset, place_of
from dreamartist_pipeline.interop.user_files import UserFiles

MAX_BYTES = 2 * 2**30
"""The largest file that is read: a LoRA of SDXL of rank 128 has 1.7 GB in float32."""


class UserFilesDataset(ReadOnlyDataset[UserFiles]):
    """Files named in parameters: the path as written there -> a function that reads the file.

    Args:
        path: base folder of relative paths.
        files: paths, nested in lists and mappings as in the parameters; None for no file.
    """

    def __init__(self, *, path: str, files: Any, metadata: dict[str, Any] | None = None) -> None:
        self._root, self._files = Path(path), tuple(_paths(files))
        self.metadata = metadata

    def load(self) -> UserFiles:
        """Return a reader for each file.

        Raises:
            FileError: no such file.
        """
        return {path: _reader(resolved(path, self._root)) for path in self._files}

    def _exists(self) -> bool:
        return all(resolved(path, self._root).is_file() for path in self._files)

    def _describe(self) -> dict[str, Any]:
        return {"files": self._files}


class UserFolderDataset(ReadOnlyDataset[UserFiles]):
    """The files of a folder named in a parameter: file name -> a function that reads the file.

    Args:
        path: base folder of a relative path.
        folder: see `folder_files`; None for no files.
    """

    def __init__(self, *, path: str, folder: str | None, metadata: dict[str, Any] | None = None) -> None:
        self._folder = None if folder is None else resolved(folder, Path(path))
        self.metadata = metadata

    def load(self) -> UserFiles:
        """Return a reader for each file.

        Raises:
            FileError: no such folder.
        """
        return {} if self._folder is None else folder_files(self._folder)

    def _exists(self) -> bool:
        return self._folder is None or self._folder.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"folder": self._folder and self._folder.as_posix()}


class UserPicturesDataset(ReadOnlyDataset[UserFiles]):
    """Picture files, and the pictures directly in folders, named in a parameter: path -> a function that reads it.

    Args:
        path: base folder of relative paths.
        sources: paths of files and folders.
    """

    def __init__(self, *, path: str, sources: Any, metadata: dict[str, Any] | None = None) -> None:
        self._root, self._sources = Path(path), tuple(_paths(sources))
        self.metadata = metadata

    def load(self) -> UserFiles:
        """Return a reader for each picture.

        Raises:
            FileError: no such file or folder, or a folder without pictures.
        """
        found: dict[str, partial[bytes]] = {}
        for source in self._sources:
            place = resolved(source, self._root)
            found |= _pictures_in(place) if place.is_dir() else {source: _reader(place)}
        return found

    def _exists(self) -> bool:
        return all(resolved(source, self._root).exists() for source in self._sources)

    def _describe(self) -> dict[str, Any]:
        return {"sources": self._sources}


def _pictures_in(folder: Path) -> dict[str, partial[bytes]]:
    """Return a reader for each picture directly in a folder, by its suffix.

    Raises:
        FileError: there is none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file())
    if not files:
        raise FileError(
            expected=f"pictures ({', '.join(PICTURE_SUFFIXES)}) in {folder}",
            got="none",
            remedy="correct the path, or name the files",
        )
    return {file.as_posix(): _reader(file) for file in files}


def folder_files(folder: Path) -> UserFiles:
    """Return a reader for each file directly in a folder, or in its subfolder `ckpts` if it has one.

    Raises:
        FileError: no such folder.
    """
    if not folder.is_dir():
        got = "a file" if folder.is_file() else "none"
        raise FileError(expected=f"a folder at {folder}", got=got, remedy=f"correct the path{place_of(folder)}")
    inner = folder / "ckpts"
    files = (inner if inner.is_dir() else folder).iterdir()
    return {file.name: _reader(file) for file in sorted(files) if file.is_file()}


def resolved(path: str, root: Path) -> Path:
    """Return a path that is relative to `root`, absolute, or relative to the home folder (`~/`)."""
    return root / Path(path).expanduser()


def _reader(file: Path) -> partial[bytes]:
    if not file.is_file():
        got = "a folder" if file.is_dir() else "none"
        raise FileError(expected=f"a file at {file}", got=got, remedy=f"correct the path{place_of(file)}")
    return partial(_read, file)


def _read(file: Path) -> bytes:
    if (size := file.stat().st_size) > MAX_BYTES:
        raise FileError(
            expected=f"a file of at most {MAX_BYTES / 2**30:g} GiB at {file}",
            got=f"{size / 2**30:.1f} GiB",
            remedy="give a picture, a LoRA or an embedding, not a whole model; save so large a LoRA in half precision",
        )
    return file.read_bytes()


def _paths(value: Any) -> Iterator[str]:
    """Yield the paths in nested lists and mappings, in their order."""
    if isinstance(value, str):
        yield value
    elif value is not None:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _paths(item)
