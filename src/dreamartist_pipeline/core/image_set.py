"""Sets of captioned images, to read and to generate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from PIL.Image import Image

from dreamartist_pipeline.params import DeviceParams, SamplerParams

CaptionedImages = Sequence[tuple[str, Callable[[], Image]]]
"""(caption, function that loads the RGB image) pairs."""


@dataclass(frozen=True)
class ImageSet(Sequence[tuple[str, Callable[[], Image]]]):
    """A stored set: `CaptionedImages`, and what determines them.

    Attributes:
        images: (caption, function that loads the RGB image) pairs.
        manifest: see `describe_images`.
    """

    images: CaptionedImages
    manifest: Mapping[str, Any]

    @overload
    def __getitem__(self, index: int) -> tuple[str, Callable[[], Image]]: ...
    @overload
    def __getitem__(self, index: slice) -> CaptionedImages: ...
    def __getitem__(self, index: int | slice) -> tuple[str, Callable[[], Image]] | CaptionedImages:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)


DrawBatches = Callable[[Sequence[Sequence[int]]], Iterator[Image]]
"""Batches of indices -> iterator over the images of all these indices."""


@dataclass(frozen=True)
class ImagesToDraw:
    """A set of images that is generated while it is saved, except for images that exist already.

    Attributes:
        captions: one per image.
        batches: indices of the images that are generated together. They are always the same and are generated whole, so
            that an interrupted set ends up with the same bytes.
        manifest: see `describe_images`.
        draw: called once with the batches that lack an image; not called for a complete set.
        image_bytes: of one image on the disk, at most.
        to_draw_fewer: what to change where the disk is too small.
        is_in: takes the manifest of an existing set with another key, and returns whether it can be used instead.
    """

    captions: Sequence[str]
    batches: Sequence[range]
    manifest: dict[str, Any]
    draw: DrawBatches = field(repr=False)
    image_bytes: int
    to_draw_fewer: str
    is_in: Callable[[Mapping[str, Any]], bool] = field(default=lambda manifest: False, repr=False)

    @property
    def key(self) -> str:
        """Name of the set, a hash of everything that determines the images."""
        return str(self.manifest["key"])


def batches_of(count: int, size: int) -> list[range]:
    """Return the indices of `count` images in batches of `size`; the last one may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def describe_images(
    fingerprint: str,
    prompts: Sequence[str],
    negative_prompt: str,
    sampler: SamplerParams,
    seed: int,
    device: DeviceParams,
    **further: Any,
) -> dict[str, Any]:
    """Return the manifest of images that the base model draws, as JSON types.

    Its `key` is the SHA-256 of the other entries. They determine the images up to rounding, which differs between
    devices and versions of libraries.

    Args:
        fingerprint: of the base model.
        prompts: one per image.
        negative_prompt: of all images.
        sampler: of all images.
        seed: of the first image.
        device: the images depend on its dtype and quantization.
        further: entries of this kind of set; those that are None are left out.
    """
    options = sampler.model_dump(mode="json")  # empty options are left out: keys stay those of earlier versions
    manifest = {
        "base_model_fingerprint": fingerprint,
        "num_images": len(prompts),
        "prompts_sha256": json_sha256(list(prompts)),
        "negative_prompt": negative_prompt,
        "sampler": {name: value for name, value in options.items() if name != "scheduler_options" or value},
        "seed": seed,
        "dtype": device.dtype,
    }
    if device.quantize != "none":
        manifest["quantize"] = device.quantize
    manifest |= {name: value for name, value in further.items() if value is not None}
    return {"key": json_sha256(manifest)[:16], **manifest}


def json_sha256(content: Any) -> str:
    """Return the SHA-256 of JSON types, as hex digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def images_sha256(captioned: Sequence[tuple[str, Image]]) -> str:
    """Return the SHA-256 over captions and pixels, as hex digits; the file format does not matter."""
    digest = hashlib.sha256()
    for caption, image in captioned:
        digest.update(json.dumps([caption, image.mode, image.size]).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
