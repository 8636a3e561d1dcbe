"""Sets of captioned images, to read and to generate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

CaptionedImages = Sequence[tuple[str, Callable[[], Image]]]
"""(caption, function that loads the RGB image) pairs."""

DrawBatches = Callable[[Sequence[Sequence[int]]], Iterator[Image]]
"""Batches of indices -> iterator over the images of all these indices."""


@dataclass(frozen=True)
class ImagesToDraw:
    """A set of images that is generated while it is saved, except for images that exist already.

    Attributes:
        key: name of the set, a hash of everything that determines the images.
        captions: one per image.
        batch_size: images per batch. The batches are always the same and are generated whole, so that an interrupted
            set ends up with the same bytes.
        manifest: the key and the settings of the set, as JSON types.
        draw: called once with the batches that lack an image; not called for a complete set.
        image_bytes: of one image on the disk, at most.
        is_in: takes the manifest of an existing set with another key, and returns whether it can be used instead.
    """

    key: str
    captions: Sequence[str]
    batch_size: int
    manifest: dict[str, Any]
    draw: DrawBatches = field(repr=False)
    image_bytes: int = 0
    is_in: Callable[[Mapping[str, Any]], bool] = field(default=lambda manifest: False, repr=False)


def images_sha256(captioned: Sequence[tuple[str, Image]]) -> str:
    """Return the SHA-256 over captions and pixels, as hex digits; the file format does not matter."""
    digest = hashlib.sha256()
    for caption, image in captioned:
        digest.update(json.dumps([caption, image.mode, image.size]).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
