"""A folder of files that belong together and are replaced together.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import TablePreview

from dreamartist_pipeline.datasets.inputs import FileError


class FileFolderDataset(AbstractDataset[Mapping[str, bytes], dict[str, bytes]]):
    """A folder as a mapping from relative names, such as `lora/fox.safetensors`, to bytes.

    A save writes a new folder beside the old one and then swaps them: files of an earlier save are removed, and an
    interrupted save leaves the earlier one unchanged.

    Args:
        path: the folder; it contains nothing else.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> dict[str, bytes]:
        """Return the content of every file by name.

        Raises:
            FileError: no such folder.
        """
        if not self._path.is_dir():
            raise FileError(
                expected=f"a folder at {self._path}", got="none", remedy="run the pipeline that creates it first"
            )
        files = sorted(path for path in self._path.rglob("*") if path.is_file())
        return {path.relative_to(self._path).as_posix(): path.read_bytes() for path in files}

    def save(self, data: Mapping[str, bytes]) -> None:
        """Replace the folder by these files.

        Raises:
            FileError: a name that points outside the folder.
        """
        for name in data:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise FileError(
                    expected=f"file names inside {self._path}", got=f"{name!r}", remedy="use relative names"
                )
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

    def preview(self) -> TablePreview:
        """Show the names and sizes of the files."""
        rows = [[name, f"{len(content):,}"] for name, content in self.load().items()]
        return TablePreview({"index": list(range(len(rows))), "columns": ["file", "bytes"], "data": rows})

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path.as_posix()}
