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
from dreamartist_pipeline.decoding.safetensors_files import SafetensorsHeader, read_header
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.whole_files import final_place, written_whole

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
        self._replaces_doubtful = False
        self.metadata = metadata

    def load(self) -> "Concept":
        """Return the concept.

        Raises:
            FileError: no file, or not a complete safetensors file.
            InputError: a file of another tool, or a damaged concept.
        """
        self.load_metadata()  # before the tensors are read and torch is imported
        from dreamartist_pipeline.interop.concept_file import read_concept

        return read_concept(self._filepath.read_bytes(), str(self._filepath))

    def load_metadata(self) -> "ConceptMetadata":
        """Return the concept's metadata, without reading its tensors.

        Raises:
            FileError: no file, or not a complete safetensors file.
            InputError: a file of another tool, or damaged metadata.
        """
        header = self._read_header()  # before torch is imported
        from dreamartist_pipeline.core.concept import ConceptMetadata

        return ConceptMetadata.read(header.metadata, str(self._filepath))

    def save(self, data: "Concept") -> None:
        """Write the file atomically.

        The last concept that is not doubtful stays beside a doubtful one, as `<name>.before<suffix>`, until one without
        doubts is in its place; see `published`.
        """
        from dreamartist_pipeline.interop.concept_file import write_concept

        earlier = final_place(self._filepath)
        if data.doubts and earlier.is_file():
            _keep_as(earlier, _before(earlier))
        with written_whole(self._filepath) as temporary:
            write_concept(data, temporary)
        self._replaces_doubtful = not data.doubts
        if self._filepath == earlier:
            self.published()

    def published(self) -> None:
        """Remove what was kept beside a doubtful concept, once the last saved one, if without doubts, is in its place.

        A file that is stored aside (`whole_files.STAGED`) gets there after its save.
        """
        if self._replaces_doubtful:
            _before(final_place(self._filepath)).unlink(missing_ok=True)

    def preview(self) -> JSONPreview:
        """Show the metadata, and how many tensors and numbers each part has, without reading the tensors.

        Of a file that is no concept, show what is wrong with it.
        """
        self._check_file()
        try:
            metadata = self.load_metadata().model_dump(mode="json", exclude_none=True)
            shown = {**_parts(self._read_header()), "metadata": metadata}
        except InputError as error:
            shown = {"error": str(error)}
        return JSONPreview(json.dumps(shown, indent=1, ensure_ascii=False))

    def _read_header(self) -> SafetensorsHeader:
        self._check_file()
        try:
            with self._filepath.open("rb") as stream:
                return read_header(stream, f"a safetensors file {self._filepath}")
        except InputError as error:
            raise FileError(error.expected, error.got, "train the concept again, or copy the file again") from error

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


def _parts(header: SafetensorsHeader) -> dict[str, Any]:
    """Return the number of tensors and of numbers by part and branch, such as "unet positive"."""
    parts: dict[str, dict[str, int]] = {}
    for name, entry in sorted(header.tensors.items()):
        words = name.split(".")
        counts = parts.setdefault(" ".join((words[0], *words[-2:-1])), {"tensors": 0, "numbers": 0})
        counts["tensors"] += 1
        counts["numbers"] += math.prod(entry.shape)
    return dict(parts)


def _before(file: Path) -> Path:
    return file.with_suffix(f".before{file.suffix}")


def _keep_as(earlier: Path, before: Path) -> None:
    """Copy the earlier concept, unless it is doubtful itself: then the one before is there."""
    if not before.exists():
        with written_whole(before) as temporary:
            shutil.copyfile(earlier, temporary)
    log.warning("The earlier concept is kept as %s, until a training has a result without doubts.", before)
