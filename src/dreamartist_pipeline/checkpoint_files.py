"""Checkpoints of trainings on disk (`core.checkpoints.Checkpoints`)."""

from __future__ import annotations

import contextlib
import logging
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamartist_pipeline.errors import is_out_of_memory
from dreamartist_pipeline.whole_files import flushed, remove_leftovers, written_whole

_DAMAGE = (  # what zipfile and torch raise for damaged files
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError),
    *(struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointStore:
    """The last two checkpoints of each training, by name.

    A checkpoint is `<name>.pt`, written completely or not at all; the one before is `<name>.before.pt`. They are ZIP
    files of torch.save, whose CRC-32 values are verified, and are read with weights_only.

    Attributes:
        path: the folder.
    """

    path: Path

    def of_recipe(self, recipe: str) -> CheckpointStore:
        """Return the store of one recipe, a subfolder."""
        return type(self)(self.path / recipe)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the latest whole checkpoint of a training, or None.

        A damaged file is named in a warning, and the one before takes its place.
        """
        newest, before = self._files(name)
        is_there = newest.exists()
        if (checkpoint := _read(newest)) is not None:
            return checkpoint
        if (checkpoint := _read(before)) is None:
            return None if is_there else _read(newest)  # another process may have renamed it meanwhile
        if is_there:
            log.warning("The checkpoint before it is used.")
        with contextlib.suppress(FileNotFoundError):
            before.replace(newest)  # so that the next save keeps it
        return checkpoint

    def save(self, name: str, checkpoint: dict[str, Any]) -> None:
        """Store a checkpoint as the latest of a training; at any time, a whole one is on the disk."""
        import torch

        newest, before = self._files(name)
        with written_whole(newest) as temporary:
            torch.save(checkpoint, temporary)
            flushed(temporary)  # before the older one is renamed
            if newest.exists():
                newest.replace(before)

    def discard(self, name: str) -> None:
        """Remove the checkpoints of a training, and the folder if nothing else is in it."""
        for file in reversed(self._files(name)):  # the older one alone would be continued
            file.unlink(missing_ok=True)
        remove_leftovers(self.path)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.path / f"{name}.pt", self.path / f"{name}.before.pt"


def _read(file: Path) -> dict[str, Any] | None:
    """Return a checkpoint, or None for no file or a damaged one, which is named in a warning."""
    import torch

    try:
        opened = file.open("rb")
    except FileNotFoundError:
        return None
    with opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                if (member := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{member} has another checksum")
            opened.seek(0)
            checkpoint: dict[str, Any] = torch.load(opened, map_location="cpu", weights_only=True)
            if not isinstance(checkpoint, dict):
                raise ValueError(f"a {type(checkpoint).__name__} in place of a dictionary")
        except _DAMAGE as error:
            if is_out_of_memory(error):  # the file is not to be replaced by an earlier state
                raise
            log.warning("The checkpoint %s is damaged and is not used (%s).", file, str(error).partition("\n")[0])
            return None
    return checkpoint
