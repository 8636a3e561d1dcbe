"""What images are measured by: similarity, prompt agreement, diversity, drift and copying.

Everything here is arithmetic on images and on embeddings `[N, D]` whose rows have length 1; which network makes the
embeddings is not decided here.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from PIL import Image

OBJECT_TOLERANCE = 40 / 255  # largest channel difference that still counts as background
UNIFORM_SHARE = 0.6  # of the border pixels, so that the border is one colour and the rest is an object
REGION_MARGIN = 0.15  # ground around the object, as a share of its longer side

_SUBJECT_SIDE = re.compile(r"\{pt\d+\}[^,{}]*? on the (left|right)\b")


def pixels(image: Image.Image) -> torch.Tensor:
    """Return the image's RGB values: float32 `[H, W, 3]` in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255


def border(image: Image.Image) -> torch.Tensor:
    """Return the outermost pixels: float32 `[2·H + 2·W, 3]` in 0..1."""
    rgb = pixels(image)
    return torch.cat([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])


# ----------------------------------------------------------------------------- the object in a picture


def object_mask(image: Image.Image) -> torch.Tensor:
    """Tell object from background: bool `[H, W]`, True where a pixel differs from the border's median colour.

    A picture without a plain background (under 60 % of its border has one colour, as in a photograph), or without
    anything in front of it, is all object.
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
    """Cut the object out: a square RGB picture of it alone, whatever its background and size were.

    Args:
        image: the picture.
        ground: the colour that the object is laid on, in the middle.
        mask: bool `[H, W]`, True where the object is; by default what `object_mask` finds.
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
    """Return the part of the picture that the subject was asked in: a half where the prompt says left or right.

    Args:
        image: the picture.
        prompt: the prompt with its '{pt1}' slot still open, e.g. "a {pt1} on the left and a yellow car on the right".
    """
    side = _SUBJECT_SIDE.search(prompt)
    if side is None:
        return image
    middle = image.width // 2
    left, right = (0, middle) if side[1] == "left" else (middle, image.width)
    return image.crop((left, 0, right, image.height))


# ------------------------------------------------------------------------------------------- distances


def similarity(embeddings: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the cosine between each row of `[N, D]` and the reference `[D]`: float32 `[N]` in -1..1."""
    return torch.nn.functional.cosine_similarity(embeddings.float(), reference.float()[None], dim=1)


def clip_score(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return how well each image `[N, D]` fits its text `[N, D]`: float32 `[N]`, 0 to 2.5.

    2.5 · max(cos, 0): CLIPScore (Hessel et al. 2021, eq. 1), here without the words "A photo depicts" before the text.
    """
    cosine = torch.nn.functional.cosine_similarity(images.float(), texts.float(), dim=1)
    return 2.5 * cosine.clamp(min=0)


def mean_pairwise_distance(embeddings: torch.Tensor) -> float:
    """Return the mean of 1 - cosine over all pairs of rows of `[N, D]`: 0 when all images are the same.

    Raises:
        ValueError: there are fewer than two rows, so there is no pair.
    """
    if len(embeddings) < 2:
        raise ValueError(f"expected at least 2 embeddings to compare, got {len(embeddings)}; draw more images")
    rows = torch.nn.functional.normalize(embeddings.float(), dim=1)
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return float((1 - (rows[first] * rows[second]).sum(dim=1)).mean())


def image_distance(first: Image.Image, second: Image.Image) -> float:
    """Return the mean absolute difference of two pictures of one size: 0 (equal) to 1 (black against white).

    Raises:
        ValueError: the sizes differ.
    """
    if first.size != second.size:
        raise ValueError(f"expected two images of one size, got {first.size} and {second.size}; resize one of them")
    return float((pixels(first) - pixels(second)).abs().mean())
