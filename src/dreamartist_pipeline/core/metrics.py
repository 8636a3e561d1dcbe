"""Arithmetic of the measures: parts of pictures, distances of pictures, and distances of embeddings `[N, D]`.

measures.py says what they measure.
"""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import torch
from PIL import Image

OBJECT_TOLERANCE = 40 / 255  # largest channel difference of background pixels
UNIFORM_SHARE = 0.6  # fraction of border pixels of one colour in a plain background
REGION_MARGIN = 0.15  # margin around the object, as a fraction of its longer side

CROP_SIDES = (1.0, 0.75, 0.5)  # of the crops of a picture, as fractions of its sides
CROPS_PER_SIDE = 3
_COLOR_BINS = 8  # per channel
_HISTOGRAM_PX = 64  # larger pictures are scaled down
_FRAME = 8  # 1 / width of the frame that is the background of a picture without an object mask

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


def luminance(image: Image.Image) -> Image.Image:
    """Return the luminance (ITU-R 601) in all three RGB channels."""
    return image.convert("L").convert("RGB")


def crops(image: Image.Image) -> list[Image.Image]:
    """Return the whole image, and 3 × 3 evenly spaced crops of each smaller size of `CROP_SIDES`."""
    found = [image]
    for side in CROP_SIDES[1:]:
        width, height = (max(1, round(side * px)) for px in image.size)
        steps = [index / (CROPS_PER_SIDE - 1) for index in range(CROPS_PER_SIDE)]
        for down, right in product(steps, steps):
            left, top = round(right * (image.width - width)), round(down * (image.height - height))
            found.append(image.crop((left, top, left + width, top + height)))
    return found


def background_mask(image: Image.Image) -> torch.Tensor:
    """Return where the background is: bool `[H, W]`.

    All pixels outside `object_mask`; in a picture without a plain background, the outer eighth on each side.
    """
    mask = object_mask(image)
    if not bool(mask.all()):
        return ~mask
    frame = torch.ones_like(mask)
    down, right = (max(1, px // _FRAME) for px in mask.shape)
    frame[down:-down, right:-right] = False
    return frame


def background_histogram(image: Image.Image) -> torch.Tensor:
    """Return the share of each RGB colour in the background: float32 `[512]`, sum 1.

    A pixel counts in the 8 nearest of 8 × 8 × 8 bins, by its distance to their centres, so that a small change of a
    colour changes little.
    """
    small = image.convert("RGB")
    small.thumbnail((_HISTOGRAM_PX, _HISTOGRAM_PX), Image.Resampling.NEAREST)
    place = (pixels(small)[background_mask(small)] * _COLOR_BINS - 0.5).clamp(0, _COLOR_BINS - 1)  # [N, 3]
    lower = place.floor().clamp(max=_COLOR_BINS - 2)
    histogram = torch.zeros(_COLOR_BINS**3)
    for corner in product((0, 1), repeat=3):
        above = torch.tensor(corner)
        share = (1 - (place - lower - above).abs()).clamp(min=0).prod(dim=1)
        red, green, blue = (lower + above).long().unbind(dim=1)
        histogram.index_add_(0, (red * _COLOR_BINS + green) * _COLOR_BINS + blue, share)
    return histogram / len(place)


# ------------------------------------------------------------------------------------------- distances


def histogram_intersection(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return what two histograms with sum 1 have in common: 0 to 1 (Swain & Ballard 1991)."""
    return float(torch.minimum(first, second).sum())


def embedding_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine similarity of each row of `[N, D]` to the same row of another tensor: float32 `[N]` in 0..2."""
    return (1 - torch.nn.functional.cosine_similarity(first.float(), second.float(), dim=1)).clamp(min=0)


def nearest_distance(embeddings: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine similarity of each row of `[N, D]` to the nearest row of `[K, D]`: float32 `[N]` in 0..2."""
    rows, columns = (torch.nn.functional.normalize(part.float(), dim=1) for part in (embeddings, others))
    return (1 - (rows @ columns.T).amax(dim=1)).clamp(min=0)


def pairwise_distances(embeddings: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine similarity of all pairs of rows of `[..., N, D]`: float32 `[..., N, N]` in 0..2."""
    rows = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    return (1 - rows @ rows.transpose(-1, -2)).clamp(min=0)


def similarity(embeddings: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of each row of `[N, D]` to the reference `[D]`: float32 `[N]` in -1..1."""
    return torch.nn.functional.cosine_similarity(embeddings.float(), reference.float()[None], dim=1)


def clip_score(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return the CLIPScore of each image `[N, D]` and its text `[N, D]`: float32 `[N]`, 0 to 2.5.

    2.5 · max(cos, 0) (Hessel et al. 2021, eq. 1), without the prefix "A photo depicts".
    """
    cosine = torch.nn.functional.cosine_similarity(images.float(), texts.float(), dim=1)
    return 2.5 * cosine.clamp(min=0)


def siglip_score(images: torch.Tensor, texts: torch.Tensor, scale: float, bias: float) -> torch.Tensor:
    """Return the probability that each image `[N, D]` and its text `[N, D]` match: float32 `[N]`.

    sigmoid(scale · cos + bias) (Zhai et al. 2023, algorithm 1).
    """
    cosine = torch.nn.functional.cosine_similarity(images.float(), texts.float(), dim=1)
    return torch.sigmoid(scale * cosine + bias)


def image_distance(first: Image.Image, second: Image.Image) -> float:
    """Return the mean absolute difference of two images of equal size: 0 (equal) to 1 (black and white).

    Raises:
        ValueError: the sizes differ.
    """
    if first.size != second.size:
        raise ValueError(f"expected images of equal size, got {first.size} and {second.size}")
    return float((pixels(first) - pixels(second)).abs().mean())
