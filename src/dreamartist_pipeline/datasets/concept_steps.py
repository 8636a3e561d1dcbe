"""The concepts of a training's kept steps, as files in a folder.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import TablePreview

from dreamartist_pipeline.core.kept_steps import KeptSteps
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.whole_files import restored, written_whole_folder

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept

_NAME = re.compile(r"(\d+)\.safetensors")


class ConceptStepsDataset(AbstractDataset[Mapping[int, "Concept"], KeptSteps]):
    """Concepts by step, `<step>.safetensors`, each a file like that of `ConceptDataset`.

    A save replaces the folder as a whole: steps of an earlier training are removed. A training without scores has an
    empty folder; an imported concept has none. Both load as no steps.

    Args:
        filepath: the folder; it contains nothing else.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> KeptSteps:
        """Return what reads the concepts; it raises what `ConceptDataset` does."""
        return {step: ConceptDataset(filepath=str(file)).load for step, file in self._files().items()}

    def save(self, data: Mapping[int, "Concept"]) -> None:
        """Replace the folder by these concepts."""
        from dreamartist_pipeline.interop.concept_file import write_concept

        with written_whole_folder(self._filepath) as temporary:
            for step, concept in data.items():
                write_concept(concept, temporary / f"{step}.safetensors")

    def preview(self) -> TablePreview:
        """Show the steps and the sizes of their files."""
        rows = [[step, f"{file.stat().st_size:,}"] for step, file in self._files().items()]
        return TablePreview({"index": list(range(len(rows))), "columns": ["step", "bytes"], "data": rows})

    def _files(self) -> dict[int, Path]:
        """Return step -> file, in order."""
        folder = restored(self._filepath)
        found = {_NAME.fullmatch(file.name): file for file in (folder.iterdir() if folder.is_dir() else ())}
        return dict(sorted((int(match[1]), file) for match, file in found.items() if match))

    def _exists(self) -> bool:
        return True  # without a folder there are no steps

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
