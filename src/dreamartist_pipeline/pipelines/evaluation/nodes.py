"""Draw with and without the concept, and compare."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from PIL import Image

from dreamartist_pipeline.core.captions import check_slots
from dreamartist_pipeline.core.devices import check_device
from dreamartist_pipeline.core.image_set import images_sha256
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, EvaluationParams

if TYPE_CHECKING:
    from pandas import DataFrame

    from dreamartist_pipeline.core.concept import Concept
else:  # Kedro evaluates a node's annotations when it registers the pipelines; these imports are slow
    Concept = DataFrame = Any

_DIGITS = 12  # of a SHA-256 in messages

log = logging.getLogger(__name__)


def check_evaluation(params: EvaluationParams, planned: PlannedConcept | None) -> None:
    """Check the slots of the prompts, that the evaluators exist, and that the scheduler supports the noise schedule.

    Raises:
        InputError: an unknown slot, a missing evaluator or an unsuitable scheduler.
    """
    from dreamartist_pipeline.backbones.evaluators import check_evaluator
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    check_slots(params.prompts, () if planned is None else planned.slots)
    text_image = () if params.text_image_model in (None, "auto") else (params.text_image_model,)
    for name in (*params.evaluators, *text_image):
        check_evaluator(name)
    check_sampler(params.sampler, planned is not None and planned.zero_terminal_snr)


def check_picture(trained_on: str | None, prepared_image: Image.Image, params: EvaluationParams) -> None:
    """Check that a concept is compared with the picture that it was trained on.

    Args:
        trained_on: `picture_sha256` of the concept; None for imported ones and those of earlier versions.
        prepared_image: the picture.
        params: of the evaluation.

    Raises:
        InputError: another picture, without `params.other_picture`.
    """
    if trained_on is None:
        log.info("The concept does not name the picture of its training: that it is the prepared one is not checked.")
    elif not params.other_picture and (found := images_sha256([("", prepared_image)])) != trained_on:
        raise InputError(
            expected=f"the concept with the prepared image of its training, {trained_on[:_DIGITS]}",
            got=f"another prepared image, {found[:_DIGITS]}",
            remedy=(
                "prepare that picture again (kedro run --pipeline ingestion --params subject=NAME,image=PICTURE), "
                "train again, or compare them nevertheless (evaluation.other_picture=true)"
            ),
        )


@checked_early("device", check_device)
@checked_early("evaluation", check_evaluation)
def evaluate_concept(
    base_model: ModelLocation,
    concept: Concept,
    prepared_image: Image.Image,
    *,
    params: EvaluationParams,
    device: DeviceParams,
    tracker: Tracker,
) -> tuple[Image.Image, dict[str, float], dict[str, dict[str, float]], DataFrame]:
    """Draw every prompt with the base model and with the concept, from the same seeds, and compare.

    Returns:
        The contact sheet, flat metrics (see `measuring.measure`), the same in kedro-mlflow's format, and a table with
        one row per measured image.

    Raises:
        InputError: another picture than that of the training, an unknown evaluator, an invalid scheduler, an incomplete
            base model, or a concept for another one.
    """
    from pandas import DataFrame

    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.evaluators import load_evaluator, load_text_image_model, own_towers
    from dreamartist_pipeline.pipelines.evaluation.drawing import draw_images
    from dreamartist_pipeline.pipelines.evaluation.measuring import measure
    from dreamartist_pipeline.pipelines.evaluation.sheet import draw_sheet

    check_picture(concept.metadata.picture_sha256, prepared_image, params)
    log.info("Adapter strengths: %s.", params.strength)
    backbone = open_base_model(base_model, device)
    evaluators = [load_evaluator(name, backbone.device) for name in params.evaluators]
    text_image = load_text_image_model(params.text_image_model, base_model, backbone.device)
    if text_image is None:
        log.info(
            "No text-image score, because there is no CLIP model for %s; "
            "set evaluation.text_image_model=clip:FOLDER_OR_HUB_ID.",
            backbone.name,
        )
    color_agreement = params.color_agreement
    if color_agreement is None:
        color_agreement = own_towers(base_model) is not None
    images, words = draw_images(base_model, concept, prepared_image, params, device)
    measured = measure(images, evaluators, text_image, color_agreement)
    sheet = draw_sheet(images, measured.metrics, params, words, evaluators[0].label if evaluators else None)
    tracker.log_image(sheet, key="previews/contact sheet", step=0)
    history = {name: {"value": value, "step": 0} for name, value in measured.metrics.items()}
    return sheet, measured.metrics, history, DataFrame(measured.rows)
