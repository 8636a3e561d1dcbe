"""Recognition by nearest neighbour: rank an object among the labelled drawings of many objects.

Objects are cut out and put on grey; where a prompt asks for another colour, only their luminance is compared. Works on
images and on embeddings `[N, D]` with rows of length 1, of any network.
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
DRAWING_SHARE = 0.9  # of the image's side, as single objects in scenes

_BLACK, _WHITE_LEVEL = (0, 0, 0), 255


def cut_out(image: Image.Image) -> Image.Image:
    """Return the object of an image on grey: RGB, square."""
    return object_region(image, GROUND)


def cut_out_drawings(sprites: torch.Tensor, size_px: int) -> list[Image.Image]:
    """Return sprites, uint8 `[N, 4, side, side]`, as `cut_out` returns the objects of images of `size_px`.

    The alpha channel gives the object's mask, so that grey drawings are complete.
    """
    silhouettes = sprites.clone()
    silhouettes[:, :3] = _WHITE_LEVEL
    drawings, masks = _painted(sprites, GROUND, size_px), _painted(silhouettes, _BLACK, size_px)
    return [object_region(drawing, GROUND, object_mask(mask)) for drawing, mask in zip(drawings, masks, strict=True)]


def _painted(sprites: torch.Tensor, ground: tuple[int, int, int], size_px: int) -> list[Image.Image]:
    """Compose an image of each sprite on a plain background."""
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


@dataclass(frozen=True)
class Gallery:
    """Labelled drawings.

    Attributes:
        embeddings: of the cut-out drawings, float32 `[N, D]`, rows of length 1.
        objects: label of each.
        styles: style of each.
    """

    embeddings: torch.Tensor
    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def without_style(self, style: str) -> Gallery:
        """Return the drawings of all other styles."""
        return self._rows([index for index, other in enumerate(self.styles) if other != style])

    def of_objects(self, words: Collection[str]) -> Gallery:
        """Return the drawings of some objects."""
        return self._rows([index for index, word in enumerate(self.objects) if word in words])

    def _rows(self, chosen: Sequence[int]) -> Gallery:
        objects, styles = (tuple(names[index] for index in chosen) for names in (self.objects, self.styles))
        return Gallery(self.embeddings[list(chosen)], objects, styles)


@dataclass(frozen=True)
class Recognition:
    """Ranking of the images of one object.

    Attributes:
        ranks: the object's rank among all objects, by image; 1 is the nearest.
        nearest: the nearest object, by image.
    """

    ranks: tuple[int, ...]
    nearest: tuple[str, ...]


def recognize(pictures: torch.Tensor, gallery: Gallery, word: str) -> Recognition:
    """Rank an object among those of a gallery by the cosine with the nearest drawing of each.

    Args:
        pictures: embeddings of the cut-out images, `[M, D]`, rows of length 1.
        gallery: the drawings.
        word: the object that the images should show.

    Raises:
        ValueError: the gallery has no drawing of that object.
    """
    words = list(dict.fromkeys(gallery.objects))
    if word not in words:
        raise ValueError(f"expected a drawing of {word!r} in the gallery; got {len(words)} other objects")
    index_of = {name: index for index, name in enumerate(words)}
    owner = torch.tensor([index_of[name] for name in gallery.objects])
    cosines = pictures.float() @ gallery.embeddings.float().T  # [M, N]
    nearness = torch.full((len(pictures), len(words)), -torch.inf)
    nearness = nearness.scatter_reduce(1, owner.expand(len(pictures), -1), cosines, "amax")  # [M, objects]
    ranks = 1 + (nearness > nearness[:, [index_of[word]]]).sum(dim=1)
    return Recognition(tuple(ranks.tolist()), tuple(words[index] for index in nearness.argmax(dim=1).tolist()))
