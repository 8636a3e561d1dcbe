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
            DatasetError: no file.
            InputError: not a safetensors file, one of another tool, or a damaged concept.
        """
        from dreamartist_pipeline.interop.concept_file import read_concept

        self._check_file()
        return read_concept(self._filepath.read_bytes(), str(self._filepath))

    def save(self, data: "Concept") -> None:
        """Write the concept under a temporary name, then rename it."""
        from dreamartist_pipeline.interop.concept_file import write_concept

        with written_whole(self._filepath) as temporary:
            temporary.write_bytes(write_concept(data))

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

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
