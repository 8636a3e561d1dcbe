"""What adapters and trigger words have to fit in a base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""network -> layer -> the shape of its weight, of every Linear and Conv2d"""


@dataclass(frozen=True)
class ModelLayout:
    """A base model as far as files have to fit it.

    shapes: of its layers. skipped: the text encoder's layers that clip_skip leaves out, where adapters act on nothing.
    text_width: of a learned vector. max_vectors: how many a prompt holds. check_word: raises an InputError for a
    trigger word that the base model knows already.
    """

    shapes: Shapes = field(repr=False)
    skipped: frozenset[str]
    text_width: int
    max_vectors: int
    check_word: Callable[[str], None]
