"""A page for a browser.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import HTMLPreview

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.whole_files import written_whole


class PageDataset(AbstractDataset[str, str]):
    """An HTML page in one UTF-8 file; a save replaces it atomically.

    Args:
        filepath: the file.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> str:
        """Return the page.

        Raises:
            FileError: no such file.
        """
        if not self._exists():
            raise FileError(
                expected=f"a page at {self._filepath}", got="no such file", remedy="run the pipeline that makes it"
            )
        return self._filepath.read_text(encoding="utf-8")

    def save(self, data: str) -> None:
        """Write the file atomically."""
        with written_whole(self._filepath) as temporary:
            temporary.write_text(data, encoding="utf-8", newline="\n")

    def preview(self) -> HTMLPreview:
        """Show the page."""
        return HTMLPreview(self.load() if self._exists() else "")

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
