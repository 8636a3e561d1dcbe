"""A folder of files that belong together and are replaced together.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import TablePreview

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.whole_files import restored, written_whole_folder


class FileFolderDataset(AbstractDataset[Mapping[str, bytes], dict[str, bytes]]):
    """A folder as a mapping from relative names, such as `lora/fox.safetensors`, to bytes.

    A save replaces the folder as a whole: files of an earlier save are removed, and an interrupted save leaves the
    earlier one unchanged.

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
        if not self._exists():
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
        with written_whole_folder(self._path) as temporary:
            for name, content in data.items():
                file = temporary / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)

    def preview(self) -> TablePreview:
        """Show the names and sizes of the files."""
        rows = [[name, f"{len(content):,}"] for name, content in self.load().items()]
        return TablePreview({"index": list(range(len(rows))), "columns": ["file", "bytes"], "data": rows})

    def _exists(self) -> bool:
        return restored(self._path).is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path.as_posix()}
