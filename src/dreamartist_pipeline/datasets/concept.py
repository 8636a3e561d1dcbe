"""The trained concept as one safetensors file with metadata.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset, DatasetError
from kedro_datasets._typing import JSONPreview

from dreamartist_pipeline.datasets.whole_files import written_whole

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept


class ConceptDataset(AbstractDataset["Concept", "Concept"]):
    """A concept in a safetensors file; a save replaces the old file in one step, and equal concepts give equal bytes.

    Args:
        filepath: the file; its folder is made when needed.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> "Concept":
        """Return the concept.

        Raises:
            DatasetError: no file, or not a safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        from dreamartist_pipeline.core.concept import Concept

        self._check_file()
        try:
            with safe_open(self._filepath, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                return Concept(tensors=tensors, metadata=dict(file.metadata() or {}))
        except SafetensorError as error:
            raise DatasetError(self._unreadable(error)) from error

    def save(self, data: "Concept") -> None:
        """Write the concept under a temporary name, then rename it."""
        from dreamartist_pipeline.interop.safetensors_bytes import write_tensors

        with written_whole(self._filepath) as temporary:
            temporary.write_bytes(write_tensors(data.tensors, data.metadata))

    def preview(self) -> JSONPreview:
        """Show the metadata and the tensors' names and shapes, without reading the tensors."""
        from safetensors import safe_open

        self._check_file()
        with safe_open(self._filepath, framework="np") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            metadata = dict(sorted((file.metadata() or {}).items()))
        return JSONPreview(json.dumps({"metadata": metadata, "tensors": shapes}, indent=1))

    def _check_file(self) -> None:
        if not self._filepath.is_file():
            raise DatasetError(
                f"expected a concept at {self._filepath}; got no such file; "
                "train it first (kedro run --pipeline train --params subject=NAME), or correct the subject's name"
            )

    def _unreadable(self, error: Exception) -> str:
        return (
            f"expected a concept (safetensors) at {self._filepath}; got something else ({error}); "
            "train it again, or put the right file there"
        )

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
