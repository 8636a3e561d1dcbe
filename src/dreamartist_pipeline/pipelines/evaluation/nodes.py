"""Draw with and without the concept, and compare."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from PIL import Image

from dreamartist_pipeline.core.captions import check_slots
from dreamartist_pipeline.core.devices import check_device
from dreamartist_pipeline.core.image_set import ImageSet, ImagesToDraw, images_sha256
from dreamartist_pipeline.core.kept_steps import KeptSteps, check_step, concept_at, of_its_training
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.user_files import UserFiles
from dreamartist_pipeline.params import DeviceParams, EvaluationParams, IngestionParams

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
    from dreamartist_pipeline.backbones.evaluators import OWN, check_evaluator
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    check_slots(params.prompts, () if planned is None else planned.slots)
    for name in (*params.evaluators, params.text_image_model):
        if name not in (None, OWN):
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
    if trained_on is None or params.other_picture:
        return
    if (found := images_sha256([("", prepared_image)])) != trained_on:
        raise InputError(
            expected=f"the concept with the prepared image of its training, {trained_on[:_DIGITS]}",
            got=f"another prepared image, {found[:_DIGITS]}",
            remedy=(
                "prepare that picture again (kedro run --pipeline ingestion --params subject=NAME,image=PICTURE), "
                "train again, or compare them nevertheless (evaluation.other_picture=true)"
            ),
        )


def check_recognition(params: EvaluationParams, planned: PlannedConcept | None, base_model: ModelLocation) -> None:
    """Check that there is a judge if recognition is asked for.

    Raises:
        InputError: there is none.
    """
    from dreamartist_pipeline.embedded.recognition import own_judge

    if params.recognition and own_judge(base_model) is None:
        raise InputError(
            expected="a judge in judge/judge.safetensors beside the base model's folder, for evaluation.recognition",
            got="none",
            remedy="set evaluation.recognition to null",
        )


def check_views(params: IngestionParams, planned: PlannedConcept | None, evaluation_views: UserFiles) -> None:
    """Check that further pictures of the subject are images of an accepted size.

    Raises:
        InputError: one is not.
    """
    from dreamartist_pipeline.core.images import open_image

    for path, read in evaluation_views.items():
        open_image(read(), _view_name(path), params.max_pixels)


def _view_name(path: str) -> str:
    return f"the picture {path} of evaluation.views"


def prepare_views(files: UserFiles, prepared_image: Image.Image, params: IngestionParams) -> list[Image.Image]:
    """Prepare further pictures of the subject like the reference image.

    The picture of the training is left out, which is logged.

    Raises:
        InputError: an invalid image.
    """
    from dreamartist_pipeline.core import images

    views = []
    for path, read in files.items():
        decoded = images.decode_image(read(), _view_name(path), params.max_pixels)
        flat = images.flatten_alpha(decoded, params.background_color)
        view = images.to_bucket(flat, params.bucket, params.fit, params.background_color)
        if view.tobytes() == prepared_image.convert("RGB").tobytes():
            log.info("%s is the picture of the training, and no unseen view: it is left out.", path)
        else:
            views.append(view)
    return views


@checked_early("device", check_device)
@checked_early("evaluation", check_evaluation)
def draw_base_images(
    base_model: ModelLocation,
    concept: Concept,
    prepared_image: Image.Image,
    params: EvaluationParams,
    device: DeviceParams,
) -> ImagesToDraw:
    """Return the images of the base model for a concept's evaluation; their dataset draws them if there are none.

    Raises:
        InputError: another picture than that of the training, an incomplete base model, or a concept for another one.
    """
    from dreamartist_pipeline.pipelines.evaluation.base_images import base_image_set

    check_picture(concept.metadata.picture_sha256, prepared_image, params)
    return base_image_set(base_model, concept, params, device)


@checked_early("device", check_device)
@checked_early("evaluation", check_evaluation)
@checked_early("evaluation", check_step, "concept_steps")
@checked_early("evaluation", check_recognition, "base_model")
@checked_early("ingestion", check_views, "evaluation_views")
def evaluate_concept(
    base_model: ModelLocation,
    concept: Concept,
    prepared_image: Image.Image,
    base_images: ImageSet,
    evaluation_views: UserFiles,
    *,
    params: EvaluationParams,
    ingestion: IngestionParams,
    device: DeviceParams,
    tracker: Tracker,
    concept_steps: KeptSteps | None = None,
) -> tuple[Image.Image, dict[str, float], dict[str, dict[str, float]], DataFrame, DataFrame, dict[str, bytes]]:
    """Draw every prompt with the concept, from the seeds of the base model's images, and compare.

    What is not measured, and why, is logged, is in the table of measures, and is the run's tag `not_measured`.

    Returns:
        The contact sheet, flat metrics (see `measuring.measure`), the same in kedro-mlflow's format, a table with one
        row per measured image, the table of measures: concept, floor and ceilings, with intervals; and the images,
        reduced, as files.

    Raises:
        InputError: another picture than that of the training, a step that is not kept, an unknown evaluator, an invalid
            scheduler, an incomplete base model, a concept for another one, or images of another evaluation.
    """
    from pandas import DataFrame

    from dreamartist_pipeline.pipelines.evaluation.base_images import base_drawings, base_image_set
    from dreamartist_pipeline.pipelines.evaluation.drawing import draw_images
    from dreamartist_pipeline.pipelines.evaluation.kept import pictures_of
    from dreamartist_pipeline.pipelines.evaluation.measuring import measure
    from dreamartist_pipeline.pipelines.evaluation.sheet import draw_sheet

    concept = concept_at(concept, concept_steps or {}, params.step, "evaluation.step")
    check_picture(concept.metadata.picture_sha256, prepared_image, params)
    if concept.metadata.picture_sha256 is None:
        log.info("The concept does not name the picture of its training: that it is the prepared one is not checked.")
    log.info("Adapter strengths: %s.", params.strength)
    requested = base_image_set(base_model, concept, params, device)
    of_base = base_drawings(base_images, requested, concept, params)
    models = _load_models(base_model, params, device)
    views = prepare_views(evaluation_views, prepared_image, ingestion)
    images, words = draw_images(base_model, concept, prepared_image, of_base, params, device, views)
    measured = measure(images, **models)
    _report_not_measured(measured.not_measured(), tracker)
    metrics, evaluators = measured.metrics, models["embedders"]
    sheet = draw_sheet(images, metrics, params, words, evaluators[0].label if evaluators else None)
    tracker.log_image(sheet, key="previews/contact sheet", step=0)
    history = {name: {"value": value, "step": 0} for name, value in metrics.items()}
    return sheet, metrics, history, DataFrame(measured.rows), DataFrame(measured.table()), pictures_of(images)


def _report_not_measured(not_measured: str, tracker: Tracker) -> None:
    if not_measured:
        log.info("Not measured: %s.", not_measured)
        tracker.set_tag("not_measured", not_measured)


def _load_models(base_model: ModelLocation, params: EvaluationParams, device: DeviceParams) -> dict[str, Any]:
    """Return the arguments of `measuring.measure` that are models.

    Raises:
        InputError: see `load_evaluator`.
    """
    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.evaluators import load_evaluators, load_text_image_model, own_towers
    from dreamartist_pipeline.embedded.recognition import load_recognizer

    target, color_agreement = open_base_model(base_model, device).device, params.color_agreement
    return {
        "embedders": load_evaluators(params.evaluators, base_model, target),
        "text_image": load_text_image_model(params.text_image_model, base_model, target),
        "color_agreement": own_towers(base_model) is not None if color_agreement is None else color_agreement,
        "recognizer": None if params.recognition is False else load_recognizer(base_model),
    }


def compare_strengths(
    base_model: ModelLocation,
    concept: Concept,
    prepared_image: Image.Image,
    params: EvaluationParams,
    device: DeviceParams,
    concept_steps: KeptSteps | None = None,
) -> tuple[Image.Image, Image.Image, DataFrame, dict[str, Any]]:
    """Draw the same prompts and seeds with several strengths, then guidance scales by step, and recommend values.

    Returns:
        A sheet of strengths, a sheet of guidance scales by step, a table with one row per setting, and the recommended
        values, see `RecommendedSettings`; without `params.sweep.images`, sheets and a table that say so, and no values.

    Raises:
        InputError: see `evaluate_concept`.
    """
    from pandas import DataFrame

    from dreamartist_pipeline.core.figures import note_sheet
    from dreamartist_pipeline.pipelines.evaluation.setting_sheets import draw_comparison
    from dreamartist_pipeline.pipelines.evaluation.strengths import compare, recommended_settings

    if not params.sweep.images:
        reason = "evaluation.sweep.images is 0"
        note = note_sheet(f"No settings are compared: {reason}.")
        return note, note, DataFrame({"left_out": [reason]}), {}
    concept = concept_at(concept, concept_steps or {}, params.step, "evaluation.step")
    kept = of_its_training(concept, concept_steps or {})
    models = _load_models(base_model, params, device)
    strengths, guidance = compare(base_model, concept, kept, prepared_image, params, device, models)
    recommended = recommended_settings(concept, strengths, guidance)
    log.info("Recommended: %s (%s).", recommended, "; ".join(recommended.reasons))
    sheets = (draw_comparison("Strengths", strengths, params), draw_comparison("Guidance", guidance, params))
    table = DataFrame([*strengths.table("strengths"), *guidance.table("guidance")])
    return *sheets, table, recommended.model_dump(mode="json")


def map_attention(
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
    concept_steps: KeptSteps | None = None,
) -> tuple[Image.Image, dict[str, bytes]]:
    """Draw pictures with the attention of class word and trigger words, per branch.

    Returns:
        A sheet, and its images, reduced, as files.

    Raises:
        InputError: see `evaluate_concept`.
    """
    from dreamartist_pipeline.pipelines.evaluation.attention import draw_attention

    concept = concept_at(concept, concept_steps or {}, params.step, "evaluation.step")
    maps = draw_attention(base_model, concept, params, device)
    return maps.sheet(), maps.files()
