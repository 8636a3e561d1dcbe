"""The images of an evaluation as a folder of small pictures."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from dreamartist_pipeline.interop.drawn_pictures import Kind, PictureEntry, write_pictures
from dreamartist_pipeline.pipelines.evaluation.measuring import CONCEPT, Drawings, EvaluationImages


def pictures_of(images: EvaluationImages) -> dict[str, bytes]:
    """Return name -> bytes of all drawn images, reduced, and their index."""
    return write_pictures(list(_pictures(images)))


def _pictures(images: EvaluationImages) -> Iterator[tuple[PictureEntry, Image.Image]]:
    for group in images.subject:
        yield from _entries("subject", group, "", images.subject[group])
    for group in images.prior:
        yield from _entries("prior", group, "", images.prior[group])
    for part, ablation in images.branches.items():
        for group, drawings in (("with", ablation.present), ("without", ablation.absent)):
            yield from _entries("branch", group, part, drawings)
    for scale, drawings in images.guidance.items():
        yield from _entries("guidance", CONCEPT, f"{scale:g}", drawings)


def _entries(kind: Kind, group: str, condition: str, drawings: Drawings) -> Iterator[tuple[PictureEntry, Image.Image]]:
    for _, prompt, seed, image in drawings.cells():
        yield PictureEntry(kind=kind, group=group, condition=condition, prompt=prompt, seed=seed), image
