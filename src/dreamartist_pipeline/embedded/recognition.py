"""Recognition: is what a picture should show nearest to it among drawings of many objects?

The object of a picture is cut out and laid on grey and, where another colour was asked for, reduced to its luminance;
drawings of known name are treated the same way. Everything here is arithmetic on images and on embeddings `[N, D]`
whose rows have length 1; which network makes the embeddings is not decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from dreamartist_pipeline.core.images import to_images
from dreamartist_pipeline.core.metrics import object_mask, object_region
from dreamartist_pipeline.embedded.scenes import Scenes, compose

GROUND = (128, 128, 128)  # of cut-outs
DRAWING_SHARE = 0.9  # a drawing's share of the picture's side, as that of single objects in scenes

_BLACK, _WHITE_LEVEL = (0, 0, 0), 255


def cut_out(image: Image.Image) -> Image.Image:
    """Return a picture's object alone on grey: RGB, square."""
    return object_region(image, GROUND)


def cut_out_drawings(sprites: torch.Tensor, size_px: int) -> list[Image.Image]:
    """Return sprites, uint8 `[N, 4, side, side]`, as `cut_out` returns the objects of pictures of `size_px`.

    What belongs to a drawing is known from its alpha channel, so that grey ones are whole, too.
    """
    silhouettes = sprites.clone()
    silhouettes[:, :3] = _WHITE_LEVEL
    drawings, masks = _painted(sprites, GROUND, size_px), _painted(silhouettes, _BLACK, size_px)
    return [object_region(drawing, GROUND, object_mask(mask)) for drawing, mask in zip(drawings, masks, strict=True)]


def _painted(sprites: torch.Tensor, ground: tuple[int, int, int], size_px: int) -> list[Image.Image]:
    """Paint every sprite alone on a plain ground."""
    pictures: list[Image.Image] = []
    for batch in sprites.split(256):
        count = len(batch)
        scenes = Scenes(
            sprite=torch.stack([torch.arange(count), torch.full((count,), -1)], dim=1).float(),
            place=torch.tensor([[0.5, 0.5, DRAWING_SHARE], [0.5, 0.5, 0.0]]).repeat(count, 1, 1),
            tint=torch.zeros(count, 2, 4),
            pattern=torch.zeros(count),
            colors=torch.tensor(ground).float().repeat(count, 2, 1),
            shift=torch.zeros(count, 2),
        )
        pictures += to_images(compose(batch, scenes, size_px))
    return pictures


def luminance(image: Image.Image) -> Image.Image:
    """Take the colours out of a picture: RGB, all channels alike (ITU-R 601)."""
    return image.convert("L").convert("RGB")


@dataclass(frozen=True)
class Gallery:
    """Drawings to recognise objects by.

    Attributes:
        embeddings: of the cut-out drawings, float32 `[N, D]`, rows of length 1.
        objects: what each of them shows.
        styles: in which style each of them is drawn.
    """

    embeddings: torch.Tensor
    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def without_style(self, style: str) -> Gallery:
        """Return the drawings in all other styles."""
        return self._rows([index for index, other in enumerate(self.styles) if other != style])

    def of_objects(self, words: Collection[str]) -> Gallery:
        """Return the drawings of some objects."""
        return self._rows([index for index, word in enumerate(self.objects) if word in words])

    def _rows(self, chosen: Sequence[int]) -> Gallery:
        objects, styles = (tuple(names[index] for index in chosen) for names in (self.objects, self.styles))
        return Gallery(self.embeddings[list(chosen)], objects, styles)


@dataclass(frozen=True)
class Recognition:
    """What pictures of one object are taken for.

    Attributes:
        ranks: the object's rank among all objects for each picture; 1 is the nearest.
        nearest: the nearest object of each picture.
    """

    ranks: tuple[int, ...]
    nearest: tuple[str, ...]


def recognize(pictures: torch.Tensor, gallery: Gallery, word: str) -> Recognition:
    """Rank an object among those of a gallery by cosine; an object is as near as the nearest of its drawings.

    Args:
        pictures: embeddings of the cut-out pictures, `[M, D]`, rows of length 1.
        gallery: the drawings.
        word: the object that the pictures should show.

    Raises:
        ValueError: the gallery has no drawing of that object.
    """
    words = list(dict.fromkeys(gallery.objects))
    if word not in words:
        raise ValueError(f"expected a drawing of {word!r} in the gallery, got {len(words)} other objects; add one")
    place = {name: index for index, name in enumerate(words)}
    owner = torch.tensor([place[name] for name in gallery.objects])
    cosines = pictures.float() @ gallery.embeddings.float().T  # [M, N]
    nearness = torch.full((len(pictures), len(words)), -torch.inf)
    nearness = nearness.scatter_reduce(1, owner.expand(len(pictures), -1), cosines, "amax")  # [M, objects]
    ranks = 1 + (nearness > nearness[:, [place[word]]]).sum(dim=1)
    return Recognition(tuple(ranks.tolist()), tuple(words[index] for index in nearness.argmax(dim=1).tolist()))


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Sequence[float], seed: int = 0, num_resamples: int = 10_000, confidence: float = 0.95
) -> Estimate:
    """Return the mean of `values` and its percentile bootstrap interval (Efron 1979); the same seed gives the same.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("expected values to average, got none; measure at least one")
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = sample[torch.randint(len(sample), (num_resamples, len(sample)), generator=generator)].mean(dim=1)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return Estimate(float(sample.mean()), low, high)
