"""The trained concept as one safetensors file with metadata.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.whole_files import written_whole

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept, ConceptMetadata

log = logging.getLogger(__name__)


class ConceptDataset(AbstractDataset["Concept", "Concept"]):
    """A concept in a safetensors file; a save replaces the file atomically, and equal concepts give equal bytes.

    Args:
        filepath: the file; its folder is created when needed.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> "Concept":
        """Return the concept.

        Raises:
            FileError: no file.
            InputError: not a safetensors file, one of another tool, or a damaged concept.
        """
        self._check_file()  # before torch is imported
        from dreamartist_pipeline.interop.concept_file import read_concept

        return read_concept(self._filepath.read_bytes(), str(self._filepath))

    def load_metadata(self) -> "ConceptMetadata":
        """Return the concept's metadata, without reading its tensors.

        Raises:
            FileError: no file, or not a safetensors file.
            InputError: a file of another tool, or damaged metadata.
        """
        texts, _ = self._read_header()  # before torch is imported
        from dreamartist_pipeline.core.concept import ConceptMetadata

        return ConceptMetadata.read(texts, str(self._filepath))

    def save(self, data: "Concept") -> None:
        """Write the file atomically.

        The last concept that is not doubtful stays beside a doubtful one, as `<name>.before<suffix>`.
        """
        from dreamartist_pipeline.interop.concept_file import write_concept

        before = self._filepath.with_suffix(f".before{self._filepath.suffix}")
        if data.doubts and self._filepath.is_file():
            self._keep_as(before)
        with written_whole(self._filepath) as temporary:
            temporary.write_bytes(write_concept(data))
        if not data.doubts:
            before.unlink(missing_ok=True)

    def _keep_as(self, before: Path) -> None:
        """Copy the concept, unless it is doubtful itself: then the one before is there."""
        if not before.exists():
            with written_whole(before) as temporary:
                shutil.copyfile(self._filepath, temporary)
        log.warning("The earlier concept is kept as %s, until a training has a result without doubts.", before)

    def preview(self) -> JSONPreview:
        """Show the metadata, and how many tensors and numbers each part has, without reading the tensors."""
        from dreamartist_pipeline.core.concept import ConceptMetadata

        texts, shapes = self._read_header()
        metadata = ConceptMetadata.read(texts, str(self._filepath)).model_dump(mode="json", exclude_none=True)
        return JSONPreview(json.dumps({**_parts(shapes), "metadata": metadata}, indent=1, ensure_ascii=False))

    def _read_header(self) -> tuple[dict[str, str], dict[str, list[int]]]:
        """Return the metadata and the shapes by name, both sorted."""
        from safetensors import SafetensorError, safe_open

        self._check_file()
        try:
            with safe_open(self._filepath, framework="np") as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
                return dict(sorted((file.metadata() or {}).items())), shapes
        except SafetensorError as error:
            raise FileError(
                expected=f"a safetensors file {self._filepath}",
                got=f"another file format ({error})",
                remedy="train the concept again, or copy the file again",
            ) from error

    def _check_file(self) -> None:
        if not self._filepath.is_file():
            raise FileError(
                expected=f"a concept at {self._filepath}",
                got="no such file",
                remedy="train it first (kedro run --pipeline train --params subject=NAME), or correct the subject",
            )

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}


def _parts(shapes: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    """Return the number of tensors and of numbers by part and branch, such as "unet positive"."""
    parts: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        first, *_, branch, _last = name.split(".")
        counts = parts.setdefault(f"{first} {branch}", {"tensors": 0, "numbers": 0})
        counts["tensors"] += 1
        counts["numbers"] += math.prod(shape)
    return parts
