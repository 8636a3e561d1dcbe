"""Files of users, read on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

UserFiles = Mapping[str, Callable[[], bytes]]
"""A path as in the parameters, or a file's name in a folder -> a function that reads the file."""
