"""The contact sheet of an evaluation."""

from __future__ import annotations

from PIL import Image

from dreamartist_pipeline.core.figures import SheetSection, contact_sheet
from dreamartist_pipeline.params import EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.measuring import BASE, CONCEPT, EvaluationImages


def draw_sheet(
    images: EvaluationImages,
    metrics: dict[str, float],
    params: EvaluationParams,
    words: dict[str, str],
    evaluator: str | None,
) -> Image.Image:
    """Draw the contact sheet.

    Args:
        images: of the base model and of the concept.
        metrics: from `measure`.
        params: of the evaluation.
        words: the positive trigger word of each slot.
        evaluator: label of the evaluator whose similarity is shown, or None.
    """
    subject_words = ", ".join(words.values())
    title = subject_words or params.class_word or "concept"
    lines = [_sampling_line(params), *_score_lines(metrics, evaluator)]
    return contact_sheet(images.reference, title, lines, _sections(images, params, subject_words))


def _sections(images: EvaluationImages, params: EvaluationParams, subject_words: str) -> list[SheetSection]:
    class_word = f"“{params.class_word}”" if params.class_word else "no class word"
    with_concept = f"with the trigger word · “{subject_words}”" if subject_words else "with the concept"
    prior_title = "Without the trigger word: should not change"
    return [
        SheetSection(
            title=title,
            left_heading=left_heading,
            right_heading=right_heading,
            prompts=drawings[CONCEPT].prompts,
            left=drawings[BASE].images,
            right=drawings[CONCEPT].images,
            seeds=drawings[BASE].seeds,
        )
        for title, left_heading, right_heading, drawings in (
            ("With the trigger word", f"base model · {class_word}", with_concept, images.subject),
            (prior_title, "base model", "with the concept attached", images.prior),
        )
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
        base, concept, ceiling = (metrics[f"similarity/{group}.{evaluator}"] for group in (BASE, CONCEPT, "ceiling"))
        lines.append(
            f"similarity of the object to the reference ({evaluator}): base {base:.2f}, concept {concept:.2f}; "
            f"reconstruction by the autoencoder {ceiling:.2f}"
        )
    if f"prompt/clip_score.{CONCEPT}" in metrics:
        base, concept = (metrics[f"prompt/clip_score.{group}"] for group in (BASE, CONCEPT))
        lines.append(f"CLIPScore of prompts: base {base:.2f}, concept {concept:.2f}")
    for name, text in (("background", "background as in the prompt"), ("color", "object colour as in the prompt")):
        if f"prompt/{name}.{CONCEPT}" in metrics:
            base, concept = (metrics[f"prompt/{name}.{group}"] for group in (BASE, CONCEPT))
            lines.append(f"{text}: base {base:.0%}, concept {concept:.0%}")
    lines.append(f"drift without the trigger word: {metrics['prior_drift/pixels']:.1%} of the pixel range")
    return lines
