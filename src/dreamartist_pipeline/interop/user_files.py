"""Where the files lie that users name."""

from __future__ import annotations

from typing import Protocol


class UserFiles(Protocol):
    """Reads files by the paths that users write."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""

    def names(self, path: str) -> dict[str, str]:
        """Return name -> path of the files of a folder; in its `ckpts`, where it has one."""
