"""Folders that are full soon, or that not even root can write to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mount_small(folder: Path, size: str = "256k") -> Iterator[Path]:
    """Create a folder on a disk of its own; skip the test where mounting is not possible."""
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield folder


@contextmanager
def mount_read_only(folder: Path, content: Path | None = None) -> Iterator[Path]:
    """Create a read-only view of `content`, an empty folder by default; skip the test where that is not possible."""
    content = content or folder.with_name(f"{folder.name}-writable")
    content.mkdir(exist_ok=True)
    with _mounted(folder, "--bind", "-o", "ro", str(content)):
        yield folder


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(parents=True)
    try:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
