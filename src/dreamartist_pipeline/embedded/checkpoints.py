"""Checkpoints of training stages on disk (`embedded.pretraining.Checkpoints`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamartist_pipeline.whole_files import written_whole


@dataclass(frozen=True)
class CheckpointStore:
    """The latest checkpoint of each stage, by name; a checkpoint is replaced as a whole or not at all.

    Attributes:
        path: the folder.
    """

    path: Path

    def of_recipe(self, recipe: str) -> CheckpointStore:
        """Return the store of one recipe, a subfolder."""
        return type(self)(self.path / recipe)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the latest checkpoint of a stage, or None."""
        import torch

        file = self.path / f"{name}.pt"
        return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None

    def save(self, name: str, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint of a stage."""
        import torch

        with written_whole(self.path / f"{name}.pt") as temporary:
            torch.save(checkpoint, temporary)
