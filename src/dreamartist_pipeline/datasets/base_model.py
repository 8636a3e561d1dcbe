"""The base model, by name only: a folder on disk or an id on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

HUB = "hub:"


class BaseModelDataset(AbstractDataset[None, str]):
    """Loads to the place of a base model in diffusers' layout; reading its weights is left to the node that needs them.

    Args:
        path: a folder, or `hub:OWNER/NAME`.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = path
        self.metadata = metadata

    def load(self) -> str:
        """Return the folder's path or the `hub:` id.

        Raises:
            DatasetError: the folder does not exist.
        """
        if not self._exists():
            raise DatasetError(
                f"expected a base model at {self._path}; got no such folder; "
                f"set --params base_model=FOLDER (diffusers' layout) or base_model={HUB}OWNER/NAME"
            )
        return self._path

    def save(self, data: None) -> None:
        """Refuse: a base model is never written.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(f"{self._path} is a base model; it is only read")

    def _exists(self) -> bool:
        return self._path.startswith(HUB) or Path(self._path).is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path}
