"""Files of users, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

UserFiles = Mapping[str, Callable[[], bytes]]
"""A path as it is written in the parameters, or a file's name in a folder -> what reads the file."""
