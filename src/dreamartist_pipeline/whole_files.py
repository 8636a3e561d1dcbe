"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`, with the same suffix, and rename it to `file` on success.

    Readers see the old file or the complete new one. Folders are created; after an error nothing is left behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def flushed(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; Windows cannot open folders, and waits for none."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
