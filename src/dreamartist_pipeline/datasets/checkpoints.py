"""The folder of a training's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamartist_pipeline.checkpoint_files import CheckpointStore
from dreamartist_pipeline.datasets.inputs import ReadOnlyDataset


class CheckpointsDataset(ReadOnlyDataset[CheckpointStore]):
    """Loads a store, to which the training itself saves its states while it runs.

    Args:
        path: the folder; it is created with the first checkpoint.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> CheckpointStore:
        """Return the store."""
        return CheckpointStore(self._path)

    def _exists(self) -> bool:
        return True  # without checkpoints, it is an empty store

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path.as_posix()}
