"""Draw with and without the concept, measure the difference, and show it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.params import DeviceParams, EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.measuring import BASE, CONCEPT, Drawings, EvaluationImages, measure

if TYPE_CHECKING:
    from pandas import DataFrame

    from dreamartist_pipeline.backbones.concepts import LoadedConcept
    from dreamartist_pipeline.backbones.evaluators import Evaluator, TextImageModel
    from dreamartist_pipeline.backbones.families import Backbone
    from dreamartist_pipeline.core.concept import Concept
    from dreamartist_pipeline.core.figures import SheetSection
else:  # Kedro resolves the hints of a node when it registers the pipelines, without importing torch
    Concept = DataFrame = Any

log = logging.getLogger(__name__)

_PATIENCE_S = 2.0  # a progress bar appears after this long

Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]
"""(prompts, seeds), one of each per image -> the images."""


def check_evaluation(params: EvaluationParams, planned: PlannedConcept | None) -> None:
    """Confirm that the evaluators are there, and that the scheduler can draw by the noise schedule of the concept.

    Raises:
        InputError: one is missing, or it cannot.
    """
    from dreamartist_pipeline.backbones.evaluators import check_evaluator
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    text_image = () if params.text_image_model in (None, "auto") else (params.text_image_model,)
    for name in (*params.evaluators, *text_image):
        check_evaluator(name)
    check_sampler(params.sampler, planned is not None and planned.zero_terminal_snr)


@checked_early("evaluation", check_evaluation)
def evaluate_concept(
    base_model: str,
    concept: Concept,
    prepared_image: Image.Image,
    *,
    params: EvaluationParams,
    device: DeviceParams,
    tracker: Tracker,
) -> tuple[Image.Image, dict[str, float], dict[str, dict[str, float]], DataFrame]:
    """Draw every prompt with the base model and with the concept, from the same seeds, and compare.

    Returns:
        The contact sheet, flat metrics (see `measuring.measure`), the same as kedro-mlflow takes them, and a table with
        one row per measured image.

    Raises:
        InputError: an evaluator is unknown, the scheduler cannot be set up, the base model is incomplete, or the
            concept belongs to another one.
    """
    from pandas import DataFrame

    from dreamartist_pipeline.backbones.base_model import open_base_model

    log.info("Adapter strengths: %s.", params.strength)
    backbone = open_base_model(base_model, device)
    evaluators = _load_evaluators(params, backbone)
    text_image = _load_text_image_model(params, base_model, backbone)
    evidence, words = _draw_evidence(backbone, concept, prepared_image, params)
    measured = measure(evidence, evaluators, text_image, _reads_colors(params, base_model))
    sheet = draw_sheet(evidence, measured.metrics, params, words, evaluators[0].label if evaluators else None)
    tracker.log_image(sheet, key="contact_sheet", step=0)
    history = {name: {"value": value, "step": 0} for name, value in measured.metrics.items()}
    return sheet, measured.metrics, history, DataFrame(measured.rows)


# ---------------------------------------------------------------------------------------------- drawing


def _load_evaluators(params: EvaluationParams, backbone: Backbone) -> list[Evaluator]:
    from dreamartist_pipeline.backbones.evaluators import load_evaluator

    return [load_evaluator(name, backbone.device) for name in params.evaluators]


def _load_text_image_model(params: EvaluationParams, base_model: str, backbone: Backbone) -> TextImageModel | None:
    from dreamartist_pipeline.backbones.evaluators import load_text_image_model

    model = load_text_image_model(params.text_image_model, base_model, backbone.device)
    if model is None:
        log.info(
            "Without a CLIP model for %s there is no text-image score; "
            "evaluation.text_image_model=clip:FOLDER_OR_HUB_ID names one.",
            backbone.name,
        )
    return model


def _reads_colors(params: EvaluationParams, base_model: str) -> bool:
    from dreamartist_pipeline.backbones.evaluators import own_towers

    return own_towers(base_model) is not None if params.color_agreement is None else params.color_agreement


def _draw_evidence(
    backbone: Backbone, concept: Concept, reference: Image.Image, params: EvaluationParams
) -> tuple[EvaluationImages, dict[str, str]]:
    """Draw everything, with the base model and with the concept.

    Returns:
        The evidence, and the positive trigger word of each slot.
    """
    from dreamartist_pipeline.backbones.concepts import attach, attach_base

    reconstruction = _reconstruct(backbone, reference)
    num_images = 2 * params.images_per_prompt * (len(params.prompts) + len(params.prior_prompts))
    loaded = {
        BASE: attach_base(backbone, concept),
        CONCEPT: attach(backbone, concept, params.strength),
    }
    words = {slot: positive for slot, (positive, _) in loaded[CONCEPT].trigger_words.items()}
    class_words = dict.fromkeys(_slots(params.prompts, words), params.class_word)
    subject_words = dict.fromkeys(class_words, concept.metadata.class_word or params.class_word)
    fillings = {BASE: class_words, CONCEPT: subject_words | words}
    with _progress_bar(num_images) as bar:
        draw = {group: _drawer(backbone, loaded[group], params, bar.update) for group in loaded}
        subject = {group: _draw(draw[group], params.prompts, fillings[group], params) for group in loaded}
        prior = {group: _draw(draw[group], params.prior_prompts, {}, params) for group in loaded}
    return EvaluationImages(reference, reconstruction, subject, prior, params.class_word), words


def _reconstruct(backbone: Backbone, image: Image.Image) -> Image.Image:
    """Send a picture through the autoencoder: what is lost here, no concept can bring back."""
    from dreamartist_pipeline.backbones.base_model import decode_latents, encode_images
    from dreamartist_pipeline.core.images import to_images, to_tensor

    mean, _ = encode_images(backbone, to_tensor([image]))
    return to_images(decode_latents(backbone, mean))[0]


def _drawer(
    backbone: Backbone, loaded: LoadedConcept, params: EvaluationParams, progress: Callable[[int], None]
) -> Draw:
    from dreamartist_pipeline.backbones.concepts import generate
    from dreamartist_pipeline.core.captions import fill_negative_prompt

    negative_prompt = fill_negative_prompt(params.negative_prompt, loaded.negative_words)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return generate(backbone, loaded, prompts, negative_prompt, seeds, params.sampler, progress)

    return draw


def _draw(draw: Draw, templates: Sequence[str], words: dict[str, str], params: EvaluationParams) -> Drawings:
    """Draw every template, its slots filled with `words`, from every seed.

    What is measured goes by the templates without their weights.
    """
    from dreamartist_pipeline.core.captions import fill_template, without_weights

    num_seeds = params.images_per_prompt
    seeds = [params.seed + i for i in range(num_seeds)]
    filled = [fill_template(template, {"class": params.class_word, **words}) for template in templates]
    images = draw([prompt for prompt in filled for _ in seeds], seeds * len(filled))
    rows = [images[start : start + num_seeds] for start in range(0, len(images), num_seeds)]
    return Drawings([without_weights(template, words) for template in templates], filled, seeds, rows)


def _slots(templates: Sequence[str], words: dict[str, str]) -> list[str]:
    """Return the names of all slots: a slot that has no trigger word is filled with the class word."""
    from dreamartist_pipeline.core.captions import slot_names

    return [name for template in templates for name in slot_names(template, words)]


def _progress_bar(num_images: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=num_images, desc="evaluation", unit="image", delay=_PATIENCE_S)


# ---------------------------------------------------------------------------------------------- showing


def draw_sheet(
    evidence: EvaluationImages,
    metrics: dict[str, float],
    params: EvaluationParams,
    words: dict[str, str],
    evaluator: str | None,
) -> Image.Image:
    """Draw the contact sheet.

    Args:
        evidence: what was drawn.
        metrics: what was measured.
        params: what was asked for.
        words: the positive trigger word of each slot.
        evaluator: the label of the evaluator whose similarity is shown, or None.
    """
    from dreamartist_pipeline.core.figures import contact_sheet

    subject_words = ", ".join(words.values())
    title = subject_words or params.class_word or "concept"
    lines = [_sampling_line(params), *_score_lines(metrics, evaluator)]
    return contact_sheet(evidence.reference, title, lines, _sections(evidence, params, subject_words))


def _sections(evidence: EvaluationImages, params: EvaluationParams, subject_words: str) -> list[SheetSection]:
    from dreamartist_pipeline.core.figures import SheetSection

    class_word = f"“{params.class_word}”" if params.class_word else "no class word"
    headings = {
        "subject": (
            f"base model · {class_word}",
            f"with the trigger word · “{subject_words}”" if subject_words else "with the concept",
        ),
        "prior": ("base model", "with the concept attached"),
    }
    titles = {"subject": "What it learned", "prior": "Without the trigger word: what must not change"}
    drawings = {"subject": evidence.subject, "prior": evidence.prior}
    return [
        SheetSection(
            title=titles[kind],
            left_heading=headings[kind][0],
            right_heading=headings[kind][1],
            prompts=drawn[CONCEPT].prompts,
            left=drawn[BASE].images,
            right=drawn[CONCEPT].images,
            seeds=drawn[BASE].seeds,
        )
        for kind, drawn in drawings.items()
    ]


def _sampling_line(params: EvaluationParams) -> str:
    sampler = params.sampler
    return (
        f"{sampler.scheduler}, {sampler.num_inference_steps} steps, guidance scale {sampler.guidance_scale:g}, "
        f"adapter strength {params.strength}"
    )


def _score_lines(metrics: dict[str, float], evaluator: str | None) -> list[str]:
    lines = []
    if evaluator:
        base, concept, ceiling = (metrics[f"{evaluator}/similarity/{group}"] for group in (BASE, CONCEPT, "ceiling"))
        lines.append(
            f"similarity to the reference ({evaluator}): base {base:.2f}, concept {concept:.2f}; "
            f"the autoencoder's own reconstruction {ceiling:.2f}"
        )
    if f"clip_score/{CONCEPT}" in metrics:
        base, concept = (metrics[f"clip_score/{group}"] for group in (BASE, CONCEPT))
        lines.append(f"CLIPScore of prompts: base {base:.2f}, concept {concept:.2f}")
    for name, text in (("background", "background as asked"), ("color", "object colour as asked")):
        if f"{name}_agreement/{CONCEPT}" in metrics:
            base, concept = (metrics[f"{name}_agreement/{group}"] for group in (BASE, CONCEPT))
            lines.append(f"{text}: base {base:.0%}, concept {concept:.0%}")
    lines.append(f"drift without the trigger word: {metrics['prior_drift_pixels']:.1%} of the pixel range")
    return lines
