"""The base model, by name only: a folder on disk or an id on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamartist_pipeline.datasets.inputs import FileError, ReadOnlyDataset, place_of

HUB = "hub:"


class BaseModelDataset(ReadOnlyDataset[str]):
    """Loads the location of a base model in diffusers' layout; nodes that need the weights read them.

    Args:
        path: a folder, or `hub:OWNER/NAME`.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = path
        self.metadata = metadata

    def load(self) -> str:
        """Return the folder's path or the `hub:` id.

        Raises:
            FileError: the folder does not exist.
        """
        if not self._exists():
            raise FileError(
                expected=f"a base model at {self._path}",
                got="no such folder",
                remedy=f"set --params base_model=FOLDER (diffusers' layout) or base_model={HUB}OWNER/NAME"
                f"{place_of(Path(self._path))}",
            )
        return self._path

    def _exists(self) -> bool:
        return self._path.startswith(HUB) or Path(self._path).is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path}
