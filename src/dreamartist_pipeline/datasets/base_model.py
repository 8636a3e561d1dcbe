"""The base model, by its location only: a folder, a single file or an id on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamartist_pipeline.core.model_location import HUB, ModelLocation
from dreamartist_pipeline.datasets.inputs import FileError, ReadOnlyDataset, place_of

_SETTINGS = {"path": "base_model", "vae": "vae", "config": "base_model_config"}  # attribute -> setting of a run

_HUB_TOO = dict.fromkeys(("path", "vae"), f", or an id of the Hugging Face hub ({HUB}OWNER/NAME)")


class BaseModelDataset(ReadOnlyDataset[ModelLocation]):
    """Loads the location of a base model; nodes that need the weights read them.

    Args:
        path: a folder in diffusers' layout, a single file, or `hub:OWNER/NAME[/FILE][@REVISION]`.
        vae: the same as `path` for another autoencoder, in an entry `path`; None for the model's own.
        config: a folder of configurations for a single file, in an entry `path`; None for those of its kind.
    """

    def __init__(
        self,
        *,
        path: str,
        vae: Mapping[str, str | None] | None = None,
        config: Mapping[str, str | None] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._path = path
        self._location = ModelLocation(path, (vae or {}).get("path"), (config or {}).get("path"))
        self.metadata = metadata

    def load(self) -> ModelLocation:
        """Return the location.

        Raises:
            FileError: a folder or file does not exist.
        """
        for name, setting in _SETTINGS.items():
            path = getattr(self._location, name)
            if not _exists(path):
                raise FileError(
                    expected=f"a folder or file at {path} for {setting}",
                    got="no such folder or file",
                    remedy=f"set --params {setting}=PATH{_HUB_TOO.get(name, '')}{place_of(Path(path))}",
                )
        return self._location

    def _exists(self) -> bool:
        return all(_exists(getattr(self._location, name)) for name in _SETTINGS)

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path, "vae": self._location.vae, "config": self._location.config}


def _exists(path: str | None) -> bool:
    return path is None or path.startswith(HUB) or Path(path).expanduser().exists()
