"""Metrics of an evaluation: a table with one row per image, and a flat dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from dreamartist_pipeline.core.captions import fill_template, slot_names
from dreamartist_pipeline.core.metrics import (
    image_distance,
    mean_pairwise_distance,
    object_region,
    similarity,
    subject_part,
)
from dreamartist_pipeline.embedded import colors

BASE, CONCEPT = "base", "concept"
TableRow = dict[str, Any]


class Embedder(Protocol):
    """Interface of an evaluator."""

    @property
    def label(self) -> str:
        """Its name in metrics and columns."""

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return embeddings `[N, D]` with rows of length 1."""


class TextImageScorer(Protocol):
    """Interface of a model that compares images with texts."""

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Return how well each image fits its text `[N]`."""


@dataclass(frozen=True)
class Drawings:
    """The images of one model.

    Attributes:
        templates: prompts with unfilled slots.
        prompts: the templates, filled.
        seeds: one per column.
        images: `images[prompt][seed]`.
    """

    templates: Sequence[str]
    prompts: Sequence[str]
    seeds: Sequence[int]
    images: Sequence[Sequence[Image.Image]]

    def flat(self) -> list[Image.Image]:
        """Return all images, prompt by prompt."""
        return [image for row in self.images for image in row]

    def cells(self) -> Iterator[tuple[str, str, int, Image.Image]]:
        """Yield template, prompt, seed and image, in the order of `flat`."""
        for template, prompt, row in zip(self.templates, self.prompts, self.images, strict=True):
            for seed, image in zip(self.seeds, row, strict=True):
                yield template, prompt, seed, image


@dataclass(frozen=True)
class EvaluationImages:
    """The images that are measured; `subject` and `prior` have the keys BASE and CONCEPT, and the same seeds.

    Attributes:
        reference: the prepared image.
        reconstruction: `reference` encoded and decoded by the autoencoder, the upper limit of similarity.
        subject: drawn from prompts with the subject's slot.
        prior: drawn from prompts without it.
        class_word: replaces trigger words for the text-image score.
    """

    reference: Image.Image
    reconstruction: Image.Image
    subject: dict[str, Drawings]
    prior: dict[str, Drawings]
    class_word: str = ""


@dataclass(frozen=True)
class Measurements:
    """Results of an evaluation.

    Attributes:
        rows: one per image.
        metrics: flat and finite; without those that no prompt asks for.
    """

    rows: list[TableRow]
    metrics: dict[str, float]


def measure(
    images: EvaluationImages,
    embedders: Sequence[Embedder],
    text_image: TextImageScorer | None = None,
    color_agreement: bool = False,
) -> Measurements:
    """Compute all metrics from pixels and from the embeddings of each evaluator.

    Metrics, where <group> is base or concept:

    * `prompt/clip_score.<group>`, with `text_image`: mean CLIPScore of image and prompt;
    * `prompt/background.<group>`, `prompt/color.<group>`, with `color_agreement`: share of images that follow the
      prompt, 0..1;
    * `variety/copying.<group>.pixels`: 1 - distance (0..1) between the reference and its nearest image;
    * `prior_drift/pixels`: mean distance, 0..1, between both models' images of prompts without trigger word;

    and for each evaluator

    * `similarity/<group>.<evaluator>` and `similarity_std/…`: cosine of the object and the reference's object;
    * `similarity/ceiling.<evaluator>`: the same for the reference's reconstruction;
    * `variety/copying.<group>.<evaluator>`: largest cosine of a whole image and the reference;
    * `variety/diversity.<group>.<evaluator>`: mean distance between the seeds of one prompt;
    * `prior_drift/<evaluator>`: mean distance of prior images between both models.
    """
    rows = {group: _subject_rows(group, drawings, images.reference) for group, drawings in images.subject.items()}
    prior_rows = _drift_rows(images.prior)
    metrics: dict[str, float] = {}
    for embedder in embedders:
        metrics |= _embedding_metrics(embedder, images, rows, prior_rows)
    for group, group_rows in rows.items():
        if text_image is not None:
            metrics[f"prompt/clip_score.{group}"] = _add_scores(group_rows, images, group, text_image)
        if color_agreement:
            metrics |= _add_agreement(group_rows, images.subject[group], group)
        metrics[f"variety/copying.{group}.pixels"] = max(row["copying_pixels"] for row in group_rows)
    metrics["prior_drift/pixels"] = _mean([row["drift_pixels"] for row in prior_rows])
    return Measurements([row for group in rows.values() for row in group] + prior_rows, metrics)


# ---------------------------------------------------------------------------------------------- pixels


def _subject_rows(group: str, drawings: Drawings, reference: Image.Image) -> list[TableRow]:
    return [
        {
            "kind": "subject",
            "group": group,
            "prompt": prompt,
            "seed": seed,
            "copying_pixels": 1 - image_distance(image.resize(reference.size), reference),
        }
        for _, prompt, seed, image in drawings.cells()
    ]


def _agreement(template: str, image: Image.Image) -> TableRow:
    """Compare the colours in a prompt with those of its image; agreement is None without a colour in the prompt."""
    backgrounds, color = colors.asked_backgrounds(template), colors.asked_object_color(template)
    seen_background = colors.background_color(image)
    seen_color = colors.object_color(subject_part(image, template))
    return {
        "background_asked": " or ".join(backgrounds),
        "background_seen": seen_background,
        "background_agrees": seen_background in backgrounds if backgrounds else None,
        "color_asked": color or "",
        "color_seen": seen_color,
        "color_agrees": seen_color == color if color else None,
    }


def _drift_rows(prior: dict[str, Drawings]) -> list[TableRow]:
    """Compare each prior image with the base model's image from the same seed."""
    pairs = zip(prior[BASE].cells(), prior[CONCEPT].cells(), strict=True)
    return [
        {
            "kind": "prior",
            "group": CONCEPT,
            "prompt": prompt,
            "seed": seed,
            "drift_pixels": image_distance(base_image, image),
        }
        for (_, _, _, base_image), (_, prompt, seed, image) in pairs
    ]


def _add_agreement(rows: Sequence[TableRow], drawings: Drawings, group: str) -> dict[str, float]:
    """Add the colours of prompt and image to each row, and return the shares that agree."""
    shares = {}
    for row, (template, _, _, image) in zip(rows, drawings.cells(), strict=True):
        row.update(_agreement(template, image))
    for name in ("background", "color"):
        answers = [float(row[f"{name}_agrees"]) for row in rows if row[f"{name}_agrees"] is not None]
        if answers:
            shares[f"prompt/{name}.{group}"] = _mean(answers)
    return shares


# ---------------------------------------------------------------------------------------------- texts


def _add_scores(rows: Sequence[TableRow], images: EvaluationImages, group: str, text_image: TextImageScorer) -> float:
    """Add the text-image score to each row, the class word in place of the trigger word, and return the mean."""
    drawings = images.subject[group]
    texts = [
        fill_template(template, dict.fromkeys(slot_names(template), images.class_word))
        for template, _, _, _ in drawings.cells()
    ]
    scores = text_image.score(drawings.flat(), texts).tolist()
    for row, score in zip(rows, scores, strict=True):
        row["clip_score"] = score
    return _mean(scores)


# ---------------------------------------------------------------------------------------------- embeddings


def _embedding_metrics(
    embedder: Embedder, images: EvaluationImages, rows: dict[str, list[TableRow]], prior_rows: list[TableRow]
) -> dict[str, float]:
    """Return the metrics of one evaluator, and add the values of each image to its row."""
    name = embedder.label
    whole = embedder.embed([images.reference])[0]
    subject, ceiling = embedder.embed([object_region(images.reference), object_region(images.reconstruction)])
    metrics = {f"similarity/ceiling.{name}": float(similarity(ceiling[None], subject)[0])}
    for group, drawings in images.subject.items():
        regions = [object_region(subject_part(image, template)) for template, _, _, image in drawings.cells()]
        similarities = similarity(embedder.embed(regions), subject)
        embeddings = embedder.embed(drawings.flat())
        copying = similarity(embeddings, whole)
        for row, value, copied in zip(rows[group], similarities.tolist(), copying.tolist(), strict=True):
            row |= {f"{name}/similarity": value, f"{name}/copying": copied}
        metrics |= {
            f"similarity/{group}.{name}": float(similarities.mean()),
            f"similarity_std/{group}.{name}": float(similarities.std(correction=0)),
            f"variety/copying.{group}.{name}": float(copying.max()),
            **_diversity(f"variety/diversity.{group}.{name}", embeddings, len(drawings.seeds)),
        }
    base, concept = (embedder.embed(images.prior[group].flat()) for group in (BASE, CONCEPT))
    drift = (1 - (base * concept).sum(dim=1)).clamp(min=0).tolist()
    for row, value in zip(prior_rows, drift, strict=True):
        row[f"{name}/drift"] = value
    return {**metrics, f"prior_drift/{name}": _mean(drift)}


def _diversity(name: str, embeddings: Tensor, num_seeds: int) -> dict[str, float]:
    """Return the mean over prompts of the mean distance between the images of one prompt; nothing for a single seed."""
    if num_seeds < 2:
        return {}
    by_prompt = embeddings.reshape(-1, num_seeds, embeddings.shape[-1])  # [P, S, D]
    return {name: _mean([mean_pairwise_distance(rows) for rows in by_prompt])}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
