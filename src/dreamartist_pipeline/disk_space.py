"""Free space on disks, checked before long work."""

from __future__ import annotations

import shutil
from pathlib import Path

from dreamartist_pipeline.errors import InputError

PNG_PIXEL_BYTES = 3
"""Of an RGB image, at most."""
_MIB = 2**20


def check_free_space(folder: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Check that there is room for what will be written.

    Args:
        folder: where; it need not exist.
        needed_bytes: an estimate.
        what: it is for, in the message.
        remedy: other than freeing space.

    Raises:
        InputError: there is less.
    """
    free_bytes = shutil.disk_usage(existing_folder(folder)).free
    if free_bytes < needed_bytes:
        raise InputError(
            expected=f"about {_size(needed_bytes)} of free space in {folder} for {what}",
            got=_size(free_bytes),
            remedy=f"free some, or {remedy}",
        )


def existing_folder(folder: Path) -> Path:
    """Return a folder, or the nearest above it that exists; a file in the place of one is returned too."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f} MiB" if num_bytes >= _MIB else f"{num_bytes / 1024:,.0f} KiB"
