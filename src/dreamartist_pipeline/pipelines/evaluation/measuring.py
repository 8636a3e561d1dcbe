"""From drawn images to numbers: one row per image, and from the rows one flat dictionary of metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

BASE, CONCEPT = "base", "concept"
TableRow = dict[str, Any]


class Embedder(Protocol):
    """What measuring needs of an evaluator."""

    @property
    def label(self) -> str:
        """Its name in metrics and columns."""

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return embeddings `[N, D]` with rows of length 1."""


class TextImageScorer(Protocol):
    """What measuring needs of a model that compares pictures with texts."""

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Return how well each picture fits its text `[N]`."""


@dataclass(frozen=True)
class Drawings:
    """What one model drew: `images[prompt][seed]`.

    templates: the prompts with open slots. prompts: the same as they were drawn. seeds: one per column.
    """

    templates: Sequence[str]
    prompts: Sequence[str]
    seeds: Sequence[int]
    images: Sequence[Sequence[Image.Image]]

    def flat(self) -> list[Image.Image]:
        """All images, prompt by prompt."""
        return [image for row in self.images for image in row]

    def cells(self) -> Iterator[tuple[str, str, int, Image.Image]]:
        """All images with template, prompt and seed, in the order of `flat`."""
        for template, prompt, row in zip(self.templates, self.prompts, self.images, strict=True):
            for seed, image in zip(self.seeds, row, strict=True):
                yield template, prompt, seed, image


@dataclass(frozen=True)
class EvaluationImages:
    """Everything that is measured.

    subject, prior: by BASE and CONCEPT; prompts with the subject's slot, and prompts without it, same seeds.
    reconstruction: the reference after the autoencoder, the best that any concept can reach. class_word: what prompts
    call the subject where a trigger word would mean nothing.
    """

    reference: Image.Image
    reconstruction: Image.Image
    subject: dict[str, Drawings]
    prior: dict[str, Drawings]
    class_word: str = ""


@dataclass(frozen=True)
class Measurements:
    """rows: one per image. metrics: flat, finite, ready for a tracker; what no prompt asks for is left out."""

    rows: list[TableRow]
    metrics: dict[str, float]


def measure(
    evidence: EvaluationImages,
    embedders: Sequence[Embedder],
    text_image: TextImageScorer | None = None,
    color_agreement: bool = False,
) -> Measurements:
    """Measure all images with arithmetic on their pixels and with each evaluator.

    Metrics, where <group> is base or concept:

    * `clip_score/<group>`, with `text_image`: mean CLIPScore of an image with its prompt;
    * `background_agreement/<group>`, `color_agreement/<group>`, with `color_agreement`: share of images that follow the
      prompt, 0..1;
    * `copying_pixels/<group>`: 1 - distance (0..1) of the image that is nearest to the reference;
    * `prior_drift_pixels`: mean distance, 0..1, between both models' images of prompts without trigger word;

    and for each evaluator

    * `<evaluator>/similarity/<group>` and `similarity_std`: cosine of the object with the reference's object;
    * `<evaluator>/similarity/ceiling`: the same for the reference's reconstruction;
    * `<evaluator>/copying/<group>`: largest cosine of a whole image, background included, with the reference;
    * `<evaluator>/diversity/<group>`: mean distance between the seeds of one prompt;
    * `<evaluator>/prior_drift`: mean distance of prior images between both models.
    """
    rows = {group: _subject_rows(group, drawings, evidence.reference) for group, drawings in evidence.subject.items()}
    prior_rows = _drift_rows(evidence.prior)
    metrics: dict[str, float] = {}
    for embedder in embedders:
        metrics |= _embedding_metrics(embedder, evidence, rows, prior_rows)
    for group, group_rows in rows.items():
        if text_image is not None:
            metrics[f"clip_score/{group}"] = _add_scores(group_rows, evidence, group, text_image)
        if color_agreement:
            metrics |= _add_agreement(group_rows, evidence.subject[group], group)
        metrics[f"copying_pixels/{group}"] = max(row["copying_pixels"] for row in group_rows)
    metrics["prior_drift_pixels"] = _mean([row["drift_pixels"] for row in prior_rows])
    return Measurements([row for group in rows.values() for row in group] + prior_rows, metrics)


# ---------------------------------------------------------------------------------------------- pixels


def _subject_rows(group: str, drawings: Drawings, reference: Image.Image) -> list[TableRow]:
    from dreamartist_pipeline.core.metrics import image_distance

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
    """Compare what a prompt asks for with what its image shows; agreement is None where nothing was asked."""
    from dreamartist_pipeline.core.metrics import subject_part
    from dreamartist_pipeline.embedded import colors

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
    """Compare every image of a prompt without trigger word with the one the base model draws from the same seed."""
    from dreamartist_pipeline.core.metrics import image_distance

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
    """Add to each row what its prompt asks for and its image shows, and return the shares that agree."""
    shares = {}
    for row, (template, _, _, image) in zip(rows, drawings.cells(), strict=True):
        row.update(_agreement(template, image))
    for name in ("background", "color"):
        answers = [float(row[f"{name}_agrees"]) for row in rows if row[f"{name}_agrees"] is not None]
        if answers:
            shares[f"{name}_agreement/{group}"] = _mean(answers)
    return shares


# ---------------------------------------------------------------------------------------------- texts


def _add_scores(rows: Sequence[TableRow], evidence: EvaluationImages, group: str, text_image: TextImageScorer) -> float:
    """Add to each row how well its image fits its prompt, in which the class word stands for the subject."""
    from dreamartist_pipeline.core.captions import fill_template, slot_names

    drawings = evidence.subject[group]
    texts = [
        fill_template(template, dict.fromkeys(slot_names(template), evidence.class_word))
        for template, _, _, _ in drawings.cells()
    ]
    scores = text_image.score(drawings.flat(), texts).tolist()
    for row, score in zip(rows, scores, strict=True):
        row["clip_score"] = score
    return _mean(scores)


# ---------------------------------------------------------------------------------------------- embeddings


def _embedding_metrics(
    embedder: Embedder, evidence: EvaluationImages, rows: dict[str, list[TableRow]], prior_rows: list[TableRow]
) -> dict[str, float]:
    """Measure with one evaluator; each image's own values are added to its row."""
    from dreamartist_pipeline.core.metrics import object_region, similarity

    name = embedder.label
    whole = embedder.embed([evidence.reference])[0]
    subject, ceiling = embedder.embed([object_region(evidence.reference), object_region(evidence.reconstruction)])
    metrics = {f"{name}/similarity/ceiling": float(similarity(ceiling[None], subject)[0])}
    for group, drawings in evidence.subject.items():
        similarities = similarity(embedder.embed(_subject_regions(drawings)), subject)
        embeddings = embedder.embed(drawings.flat())
        copying = similarity(embeddings, whole)
        for row, value, copied in zip(rows[group], similarities.tolist(), copying.tolist(), strict=True):
            row |= {f"{name}/similarity": value, f"{name}/copying": copied}
        metrics |= {
            f"{name}/similarity/{group}": float(similarities.mean()),
            f"{name}/similarity_std/{group}": float(similarities.std(correction=0)),
            f"{name}/copying/{group}": float(copying.max()),
            **_diversity(f"{name}/diversity/{group}", embeddings, len(drawings.seeds)),
        }
    base, concept = (embedder.embed(evidence.prior[group].flat()) for group in (BASE, CONCEPT))
    drift = (1 - (base * concept).sum(dim=1)).clamp(min=0).tolist()
    for row, value in zip(prior_rows, drift, strict=True):
        row[f"{name}/drift"] = value
    return {**metrics, f"{name}/prior_drift": _mean(drift)}


def _subject_regions(drawings: Drawings) -> list[Image.Image]:
    from dreamartist_pipeline.core.metrics import object_region, subject_part

    return [object_region(subject_part(image, template)) for template, _, _, image in drawings.cells()]


def _diversity(name: str, embeddings: Tensor, num_seeds: int) -> dict[str, float]:
    """Return the mean over prompts of the mean distance between the images of one prompt; nothing for a single seed."""
    from dreamartist_pipeline.core.metrics import mean_pairwise_distance

    if num_seeds < 2:
        return {}
    by_prompt = embeddings.reshape(-1, num_seeds, embeddings.shape[-1])  # [P, S, D]
    return {name: _mean([mean_pairwise_distance(rows) for rows in by_prompt])}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
