"""Sets of the base model's images in tests: their dataset, and an evaluation without files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.image_set import ImageSet, ImagesToDraw
from dreamartist_pipeline.datasets.image_set import ImageSetDataset
from dreamartist_pipeline.params import DeviceParams, EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.nodes import draw_base_images, evaluate_concept


def set_dataset(manifest: Path, folder: Path) -> ImageSetDataset:
    """Return a dataset with a subject's manifest and the folder of all sets."""
    return ImageSetDataset(filepath=str(manifest), path=str(folder), title="set of images", command="kedro run")


def drawn(images: ImagesToDraw) -> ImageSet:
    """Return a set as it is loaded, without files."""
    pairs = zip(images.captions, images.draw(images.batches), strict=True)
    return ImageSet([(caption, partial(lambda one: one, image)) for caption, image in pairs], images.manifest)


def evaluate(
    base_model: Any,
    concept: Concept,
    picture: Any,
    views: Any = (),
    *,
    params: EvaluationParams,
    device: DeviceParams,
    **others: Any,
) -> Any:
    """Return the results of `evaluate_concept`, after the images of the base model have been drawn."""
    of_base = drawn(draw_base_images(base_model, concept, picture, params, device))
    return evaluate_concept(base_model, concept, picture, of_base, dict(views), params=params, device=device, **others)
