"""Image metrics: similarity, prompt agreement, diversity, drift and copying.

All functions take images, or embeddings `[N, D]` of any network.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from PIL import Image

OBJECT_TOLERANCE = 40 / 255  # largest channel difference of background pixels
UNIFORM_SHARE = 0.6  # fraction of border pixels of one colour in a plain background
REGION_MARGIN = 0.15  # margin around the object, as a fraction of its longer side

_SUBJECT_SIDE = re.compile(r"\{pt\d+\}[^,{}]*? on the (left|right)\b")


def pixels(image: Image.Image) -> torch.Tensor:
    """Return the RGB values of an image: float32 `[H, W, 3]` in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255


def border(image: Image.Image) -> torch.Tensor:
    """Return the outermost pixels: float32 `[2·H + 2·W, 3]` in 0..1."""
    rgb = pixels(image)
    return torch.cat([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])


# ----------------------------------------------------------------------------- the object in a picture


def object_mask(image: Image.Image) -> torch.Tensor:
    """Segment the object: bool `[H, W]`, True where a pixel differs from the median colour of the border.

    If less than 60 % of the border has that colour, as in photographs, or if no pixel differs, all pixels are True.
    """
    median = border(image).median(dim=0).values
    differs = (pixels(image) - median).abs().amax(dim=-1) > OBJECT_TOLERANCE
    share = ((border(image) - median).abs().amax(dim=-1) <= OBJECT_TOLERANCE).float().mean()
    if share < UNIFORM_SHARE or not differs.any():
        return torch.ones_like(differs)
    return differs


def object_region(
    image: Image.Image, ground: str | tuple[int, int, int] = "white", mask: torch.Tensor | None = None
) -> Image.Image:
    """Crop the object to a centred square RGB image, independent of its background and position.

    Args:
        image: with the object.
        ground: colour of the new background.
        mask: bool `[H, W]`, True for the object; by default `object_mask(image)`.
    """
    mask = object_mask(image) if mask is None else mask
    if bool(mask.all()):
        return image.convert("RGB")
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    alpha = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    side_px = round(max(box[2] - box[0], box[3] - box[1]) * (1 + REGION_MARGIN))
    region = Image.new("RGB", (side_px, side_px), ground)
    corner = ((side_px - (box[2] - box[0])) // 2, (side_px - (box[3] - box[1])) // 2)
    region.paste(image.convert("RGB").crop(box), corner, alpha.crop(box))
    return region


def subject_part(image: Image.Image, prompt: str) -> Image.Image:
    """Return the half of the image that the prompt places the subject in, or the whole image if it names no side.

    Args:
        image: generated from the prompt.
        prompt: with its '{pt1}' slot, e.g. "a {pt1} on the left and a yellow car on the right".
    """
    side = _SUBJECT_SIDE.search(prompt)
    if side is None:
        return image
    middle = image.width // 2
    left, right = (0, middle) if side[1] == "left" else (middle, image.width)
    return image.crop((left, 0, right, image.height))


# ------------------------------------------------------------------------------------------- distances


def similarity(embeddings: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of each row of `[N, D]` to the reference `[D]`: float32 `[N]` in -1..1."""
    return torch.nn.functional.cosine_similarity(embeddings.float(), reference.float()[None], dim=1)


def clip_score(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return the CLIPScore of each image `[N, D]` and its text `[N, D]`: float32 `[N]`, 0 to 2.5.

    2.5 · max(cos, 0) (Hessel et al. 2021, eq. 1), without the prefix "A photo depicts".
    """
    cosine = torch.nn.functional.cosine_similarity(images.float(), texts.float(), dim=1)
    return 2.5 * cosine.clamp(min=0)


def mean_pairwise_distance(embeddings: torch.Tensor) -> float:
    """Return the mean of 1 - cosine similarity over all pairs of rows of `[N, D]`.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if len(embeddings) < 2:
        raise ValueError(f"expected at least 2 embeddings, got {len(embeddings)}")
    rows = torch.nn.functional.normalize(embeddings.float(), dim=1)
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return float((1 - (rows[first] * rows[second]).sum(dim=1)).mean())


def image_distance(first: Image.Image, second: Image.Image) -> float:
    """Return the mean absolute difference of two images of equal size: 0 (equal) to 1 (black and white).

    Raises:
        ValueError: the sizes differ.
    """
    if first.size != second.size:
        raise ValueError(f"expected images of equal size, got {first.size} and {second.size}")
    return float((pixels(first) - pixels(second)).abs().mean())
