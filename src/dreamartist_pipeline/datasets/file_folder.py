"""A folder of files that belong together and are replaced together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from kedro.io import AbstractDataset, DatasetError


class FileFolderDataset(AbstractDataset[Mapping[str, bytes], dict[str, bytes]]):
    """A folder as a mapping of relative names, such as `lora/fox.safetensors`, to bytes.

    A save writes a new folder beside the old one and then takes its place: files of an earlier save are gone, and an
    interrupted save leaves the earlier one alone.

    Args:
        path: the folder; it holds nothing else.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> dict[str, bytes]:
        """Read every file, by name.

        Raises:
            DatasetError: there is no such folder.
        """
        if not self._path.is_dir():
            raise DatasetError(f"expected a folder at {self._path}; got none; run the pipeline that makes it")
        files = sorted(path for path in self._path.rglob("*") if path.is_file())
        return {path.relative_to(self._path).as_posix(): path.read_bytes() for path in files}

    def save(self, data: Mapping[str, bytes]) -> None:
        """Replace the folder by these files.

        Raises:
            DatasetError: a name would lead out of the folder.
        """
        for name in data:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise DatasetError(f"expected names inside {self._path}; got {name!r}; give a relative name")
        partial, old = (self._path.with_name(f".{self._path.name}.{state}") for state in ("partial", "old"))
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name, content in data.items():
                file = partial / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            if self._path.exists():
                self._path.rename(old)
            partial.rename(self._path)
        finally:
            if old.exists() and not self._path.exists():
                old.rename(self._path)
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path.as_posix()}
