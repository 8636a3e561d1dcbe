"""Sets of captioned images: as they are read, and as they are to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

CaptionedImages = Sequence[tuple[str, Callable[[], Image]]]
"""Captions, each with what reads its RGB image."""

DrawBatches = Callable[[Sequence[Sequence[int]]], Iterator[Image]]
"""Batches of indices -> the images of all these indices, one after the other."""


@dataclass(frozen=True)
class ImagesToDraw:
    """A set that is drawn while it is saved, as far as it is not there.

    Attributes:
        key: the set's name; stands for everything that shapes the images.
        captions: one per image.
        batch_size: how many images are drawn at once. Batches are cut alike every time, and drawn whole, so that a set
            holds the same bytes whether or not it was interrupted.
        manifest: the key and what made the set; JSON types.
        draw: called once with the batches that lack an image, and not at all for a whole set.
        is_in: whether a set of another name, given its manifest, is the same; it is then used in place of a new one.
    """

    key: str
    captions: Sequence[str]
    batch_size: int
    manifest: dict[str, Any]
    draw: DrawBatches = field(repr=False)
    is_in: Callable[[Mapping[str, Any]], bool] = field(default=lambda manifest: False, repr=False)
