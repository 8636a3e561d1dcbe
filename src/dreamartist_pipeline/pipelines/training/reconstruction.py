"""What the base model's autoencoder keeps of the reference image: the limit of every training on it."""

from __future__ import annotations

import logging

from PIL.Image import Image

from dreamartist_pipeline.backbones.base_model import reconstruct
from dreamartist_pipeline.backbones.evaluators import load_evaluator
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.images import image_grid, is_nearly_one_color
from dreamartist_pipeline.core.metrics import similarity
from dreamartist_pipeline.core.tracking import Tracker

_EVALUATOR = "efficientnet-lite0"
# Between the 16 bundled drawings (0.79…0.95) and photographs at 64 px (13 of 15 are below, 0.52…0.76).
LEAST_SIMILARITY = 0.77

log = logging.getLogger(__name__)


def report_reconstruction(backbone: Backbone, image: Image, tracker: Tracker) -> Image:
    """Send the prepared image through the autoencoder, compare, and log what a training can reach at most.

    The comparison is of whole pictures, background included: the cosine of their EfficientNet-Lite0 features. (The
    ceiling in `evaluate` is that of the object alone.)

    Returns:
        The image beside its reconstruction.
    """
    reconstruction = reconstruct(backbone, image)
    original, reconstructed = load_evaluator(_EVALUATOR, backbone.device).embed([image, reconstruction])
    reached = float(similarity(reconstructed[None], original)[0])
    tracker.log_metrics({"reconstruction/similarity": reached}, step=0)
    if is_nearly_one_color(image):
        log.info("The picture is nearly one colour: its similarity after the base model's autoencoder says little.")
    elif reached < LEAST_SIMILARITY:
        log.warning(
            "Expect blurred pictures that are little like yours: the base model's autoencoder keeps the picture at a "
            "similarity of %.2f (%.2f or more is fine), and no training brings back the rest. A photograph needs a "
            "base model of photographs, and its prompts: --env sd15 --params base_model=FOLDER,prompt_database=FILE "
            "(docs/running.md).",
            reached,
            LEAST_SIMILARITY,
        )
    else:
        log.info(
            "The base model can draw this picture at a similarity of at most %.2f (%.2f or more is fine).",
            reached,
            LEAST_SIMILARITY,
        )
    labels = ["your picture, prepared", f"after the autoencoder: similarity {reached:.2f}"]
    return image_grid([image, reconstruction], columns=2, labels=labels)
