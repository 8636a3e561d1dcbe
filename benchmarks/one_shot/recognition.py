"""Recognition of one-shot subjects among the drawings of many objects.

All rows of the table have the same prompts; `gallery.py` has the arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from dreamartist_pipeline.backbones.evaluators import Evaluator
from dreamartist_pipeline.core.images import to_images
from dreamartist_pipeline.core.metrics import luminance
from dreamartist_pipeline.embedded.scenes import compose
from one_shot.gallery import Gallery, cut_out, cut_out_drawings, recognize
from one_shot.prompts import GROUP_OF, Prompts
from one_shot.world import World

FIXED, ALL = "fixed", "all"  # galleries
CONCEPTS, KNOWN, CLASS_WORD, REAL, RECONSTRUCTED = "concepts", "known", "class word", "real", "reconstructed"  # rows
KNOWN_OBJECTS = {  # object -> style excluded from its gallery; kinds in the proportions of the reporting subjects
    "rabbit": "noto",
    "turtle": "twemoji",
    "butterfly": "noto",
    "crab": "twemoji",
    "duck": "noto",
    "apple": "twemoji",
    "carrot": "noto",
    "airplane": "twemoji",
    "castle": "noto",
    "camera": "twemoji",
}

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Drawn:
    """Images of all prompts for one object.

    Attributes:
        row: of the table.
        word: the object.
        style: of the reference picture; excluded from the gallery.
        images: one for each prompt.
    """

    row: str
    word: str
    style: str
    images: Sequence[Image.Image]


# ------------------------------------------------------------------------------------------- ceilings


def paint_real(world: World, word: str, prompts: Prompts, size_px: int) -> torch.Tensor:
    """Compose the scenes of the prompts from the real drawing, in the style of the prompt or else of the reference.

    Returns:
        float32 `[N, 3, size_px, size_px]` in [-1, 1].
    """
    styles = [
        shown.style if kind == "style" else world.references[word]
        for kind, shown in zip(prompts.kinds, prompts.scenes.shown, strict=True)
    ]
    sprite = torch.tensor([[float(world.drawings[word, style]), -1.0] for style in styles])
    return compose(world.sprites.images, dataclasses.replace(prompts.scenes, sprite=sprite), size_px)


def draw_ceilings(
    world: World, prompts: Prompts, size_px: int, reconstruct: Callable[[torch.Tensor], torch.Tensor]
) -> list[Drawn]:
    """Return the real images of every subject, and their reconstructions by an autoencoder."""
    ceilings: list[Drawn] = []
    for word, style in world.references.items():
        real = paint_real(world, word, prompts, size_px)
        ceilings.append(Drawn(REAL, word, style, to_images(real)))
        ceilings.append(Drawn(RECONSTRUCTED, word, style, to_images(reconstruct(real))))
    return ceilings


# ------------------------------------------------------------------------------------------- recognising

Galleries = Mapping[tuple[str, bool], Gallery]
"""(gallery, in colour) -> its drawings."""


def build_galleries(world: World, names: Sequence[str], size_px: int, evaluator: Evaluator) -> Galleries:
    """Embed the drawings of galleries, rendered at the size of the images."""
    words = set(world.sprites.objects) if ALL in names else set(world.fixed)
    chosen = [index for index, word in enumerate(world.sprites.objects) if word in words]
    objects, styles = (tuple(of[index] for index in chosen) for of in (world.sprites.objects, world.sprites.styles))
    drawings = cut_out_drawings(world.sprites.images[chosen], size_px)
    galleries: dict[tuple[str, bool], Gallery] = {}
    for in_color in (True, False):
        label = f"drawings {'in colour' if in_color else 'without colours'}"
        whole = Gallery(_embed(evaluator, drawings, in_color, label), objects, styles)
        by_name = {FIXED: whole.of_objects(world.fixed), ALL: whole}
        galleries |= {(name, in_color): by_name[name] for name in names}
    return galleries


def answers(drawn: Drawn, prompts: Prompts, galleries: Galleries, evaluator: Evaluator) -> pd.DataFrame:
    """Return one row per image and gallery: rank of the object, and nearest object.

    For prompts with another colour, only luminance is compared.
    """
    lines: list[pd.DataFrame] = []
    for in_color in (True, False):
        chosen = [index for index, kind in enumerate(prompts.kinds) if (kind != "color") is in_color]
        embeddings = _embed(evaluator, [cut_out(drawn.images[index]) for index in chosen], in_color)
        asked = pd.DataFrame(
            {
                "row": drawn.row,
                "object": drawn.word,
                "group": [GROUP_OF[prompts.kinds[index]] for index in chosen],
                "kind": [prompts.kinds[index] for index in chosen],
                "prompt": [prompts.templates[index] for index in chosen],
                "picture": chosen,
            }
        )
        for (name, other), gallery in galleries.items():
            if other is in_color:
                found = recognize(embeddings, gallery.without_style(drawn.style), drawn.word)
                lines.append(asked.assign(gallery=name, rank=found.ranks, nearest=found.nearest))
    return pd.concat(lines, ignore_index=True)


def _embed(
    evaluator: Evaluator, cut_outs: Sequence[Image.Image], in_color: bool, label: str | None = None
) -> torch.Tensor:
    """Embed cut-out objects, with a progress bar if there is a label."""
    images = cut_outs if in_color else [luminance(image) for image in cut_outs]
    starts = tqdm(range(0, len(images), _BATCH_SIZE), desc=label, unit="batch", disable=label is None)
    return torch.cat([evaluator.embed(images[start : start + _BATCH_SIZE]) for start in starts])
