"""Values that the configuration takes from the environment, `${env:NAME}`: MLflow gets the reference in their place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_SHORTEST = 4  # characters of a value that is hidden; shorter ones are no secrets, and stand in too many texts
_SHOWN = ("MLFLOW_TRACKING_URI",)  # an address

_reference_of: dict[str, str] = {}  # value -> `${env:NAME}`, of this process


def environment(name: str, default: str = "") -> str:
    """Return an environment variable, the resolver `${env:NAME, default}`, and remember its value."""
    value = os.environ.get(name)
    if value is None:
        return default
    if len(value) >= _SHORTEST and name not in _SHOWN:
        _reference_of[value] = f"${{env:{name}}}"
    return value


def without_environment(value: Any) -> Any:
    """Return a value, also of nested mappings and lists, with references in place of what the environment gave."""
    if isinstance(value, Mapping):
        return {name: without_environment(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_environment(item) for item in value)
    if not isinstance(value, str) or not _reference_of:
        return value
    longest_first = sorted(_reference_of, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    return re.sub(pattern, lambda match: _reference_of[match[0]], value)
