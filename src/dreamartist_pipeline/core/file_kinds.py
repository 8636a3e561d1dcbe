"""Kinds of files, told apart by the keys in them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of file by its keys.

    Attributes:
        pattern: of a key; one such key is enough.
        holds: what such a file is.
        advice: what can be done; "" for what follows from the base models.
        base_models: titles of the base models that have such layers; none of those that are not supported.
    """

    pattern: str
    holds: str
    advice: str = ""
    base_models: tuple[str, ...] = ()

    def key_in(self, keys: Collection[str]) -> str | None:
        """Return the first key of this kind, if any."""
        return next((key for key in sorted(keys) if re.search(self.pattern, key)), None)
