"""The measures of an evaluation: estimates with intervals beside floor and ceilings, and a row per image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from torch import Tensor, tensor

from dreamartist_pipeline.core import measures
from dreamartist_pipeline.core.intervals import Estimate, bootstrap_grid, bootstrap_pairs
from dreamartist_pipeline.core.measures import Embedder, Measure, Recognizer, SubjectMeasures, TextImageScorer
from dreamartist_pipeline.core.metrics import (
    image_distance,
    pairwise_distances,
    similarity,
    subject_part,
)
from dreamartist_pipeline.embedded import colors

BASE, CONCEPT = "base", "concept"
REFERENCE, CEILING = "reference", "ceiling"  # the reference itself, and its reconstruction by the autoencoder
PIXELS = "pixels"
TableRow = dict[str, Any]
LeftOut = Mapping[tuple[str, str], str]
"""(measure, condition) -> why it is not measured; the condition is that of `Result`."""


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

    def flat_templates(self) -> list[str]:
        """Return the template of each image, in the order of `flat`."""
        return [template for template, _, _, _ in self.cells()]

    def of_first_seeds(self, count: int) -> Drawings:
        """Return the images of the first seeds."""
        return replace(self, seeds=self.seeds[:count], images=[row[:count] for row in self.images])

    def grid(self, values: Tensor) -> Tensor:
        """Return values `[N]`, in the order of `flat`, as `[P, S]`."""
        return values.reshape(len(self.prompts), len(self.seeds))

    @classmethod
    def of_picture(cls, picture: Image.Image) -> Drawings:
        """Return one picture in place of drawn ones; no part of it is cut out."""
        return cls([""], [""], [0], [[picture]])


@dataclass(frozen=True)
class Ablation:
    """Images with and without something, of the same prompts and seeds."""

    present: Drawings
    absent: Drawings


@dataclass(frozen=True)
class EvaluationImages:
    """The images that are measured; `subject` and `prior` have the keys BASE and CONCEPT, and the same seeds.

    Attributes:
        reference: the prepared image.
        reconstruction: `reference` encoded and decoded by the autoencoder, the upper limit of similarity.
        subject: drawn from prompts with the subject's slot.
        prior: drawn from prompts without it.
        class_word: replaces trigger words for the text-image score.
        views: further pictures of the subject, which the training has not seen.
        branches: what the negative branch has -> the concept's images with and without it.
        guidance: guidance scale -> the concept's images.
        left_out: (measure, condition) whose images are not drawn -> why.
    """

    reference: Image.Image
    reconstruction: Image.Image
    subject: dict[str, Drawings]
    prior: dict[str, Drawings]
    class_word: str = ""
    views: Sequence[Image.Image] = ()
    branches: Mapping[str, Ablation] = field(default_factory=dict)
    guidance: Mapping[float, Drawings] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """An estimate of a measure.

    Attributes:
        measure: what is measured.
        group: BASE, CONCEPT, REFERENCE or CEILING.
        by: the model that measures, or PIXELS.
        estimate: over prompts × seeds.
        num_images: that have a value.
        condition: what differs from the other images: a part of the negative branch, or a guidance scale.
    """

    measure: Measure
    group: str
    by: str
    estimate: Estimate
    num_images: int
    condition: str = ""

    @property
    def key(self) -> str:
        """The name of its metric; drift, effects and guidance are of the concept only, which the name omits."""
        alone = self.condition or self.measure is measures.PRIOR_DRIFT
        return measures.metric_key(self.measure, self.condition if alone else self.group, self.by)


@dataclass(frozen=True)
class Measurements:
    """Results of an evaluation.

    Attributes:
        rows: one per image.
        results: one per measure, group and model; without those that no prompt asks for.
        left_out: what is not measured, and why.
        spreads: metrics of the standard deviation of similarity over the images.
    """

    rows: list[TableRow]
    results: list[Result]
    left_out: LeftOut
    spreads: dict[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """All estimates, and `intervals/<metric>.low` and `.high` for those with an interval; flat and finite."""
        values = {result.key: result.estimate.mean for result in self.results} | self.spreads
        for result in self.results:
            for end in ("low", "high"):
                if math.isfinite(value := getattr(result.estimate, end)):
                    values[f"intervals/{result.key.replace('/', '.')}.{end}"] = value
        return values

    def not_measured(self) -> str:
        """Return what is not measured in one line, by reason; "" if everything is."""
        names: dict[str, list[str]] = {}
        for key, reason in self.left_out.items():
            names.setdefault(reason, []).append(".".join(filter(None, key)))
        return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in names.items())

    def table(self) -> list[TableRow]:
        """Return a row per measure and model: concept and floor with their intervals, ceilings, and definition."""
        rows: dict[tuple[str, str, str], TableRow] = {}
        for one in self.results:
            key = (one.measure.name, one.condition, one.by)
            row = rows.setdefault(key, {**_empty_row(*key), **one.measure.by_definition})
            row[one.group] = one.estimate.mean
            if one.group in (BASE, CONCEPT):
                row |= {f"{one.group}_low": one.estimate.low, f"{one.group}_high": one.estimate.high}
            if one.group == CONCEPT:
                row["images"] = one.num_images
        for (name, condition, by), row in rows.items():
            for usual in _USUAL.get(name, ()):  # floor and ceilings of a sweep are those of what is swept
                if condition and (beside := rows.get((usual, "", by))):
                    row |= {column: beside[column] for column in _BESIDE}
        left_out = [_empty_row(*key, "") | {"left_out": reason} for key, reason in self.left_out.items()]
        return sorted([*rows.values(), *left_out], key=lambda row: list(_NAMED).index(row["measure"]))


_NAMED = {one.name: one for one in measures.MEASURES}
_BESIDE = (BASE, f"{BASE}_low", f"{BASE}_high", REFERENCE, CEILING)
_USUAL = {
    measures.GUIDANCE_SIMILARITY.name: (measures.SIMILARITY.name,),
    measures.GUIDANCE_AGREEMENT.name: (measures.CLIP_SCORE.name, measures.SIGLIP_SCORE.name),
}


def _empty_row(name: str, condition: str, by: str) -> TableRow:
    one = _NAMED[name]
    return {
        **{"measure": name, "condition": condition, "by": by, "title": one.title},
        **{"better": one.better, "unit": one.unit, "images": 0},
        **dict.fromkeys((CONCEPT, f"{CONCEPT}_low", f"{CONCEPT}_high", *_BESIDE), math.nan),
        "left_out": "",
    }


def measure(
    images: EvaluationImages,
    embedders: Sequence[Embedder],
    text_image: TextImageScorer | None = None,
    color_agreement: bool = False,
    recognizer: Recognizer | None = None,
) -> Measurements:
    """Compute all measures of `core.measures` that the models and the images allow.

    The name of a metric is `<measure>/<group>.<model>`, where a group is `base` (the base model with the class word,
    the floor), `concept`, `reference` (the reference itself) or `ceiling` (its reconstruction by the autoencoder);
    `prior_drift/<model>`; `effect/<of what>.<part of the negative branch>.<model>`; or
    `guidance/<what>.<scale>.<model>`.

    Args:
        images: of both models.
        embedders: image towers; without any, only pixels are compared.
        text_image: for the agreement of images and prompts, or None.
        color_agreement: whether colours in prompts are compared with the images.
        recognizer: names objects in images, or None.
    """
    task = _Task(images)
    for embedder in embedders:
        task.measure_by(embedder)
    task.measure_pixels()
    if text_image is not None:
        task.measure_agreement(text_image)
    if color_agreement:
        task.measure_colors()
    if recognizer is not None:
        task.measure_recognition(recognizer)
    return Measurements(
        [row for rows in (*task.rows.values(), task.prior_rows) for row in rows],
        task.results,
        {**images.left_out, **_missing(images, embedders, text_image, color_agreement, recognizer)},
        task.spreads,
    )


def _missing(
    images: EvaluationImages,
    embedders: Sequence[Embedder],
    text_image: TextImageScorer | None,
    color_agreement: bool,
    recognizer: Recognizer | None,
) -> dict[tuple[str, str], str]:
    """Return why measures are left out that lack a model, pictures or seeds."""
    missing: dict[Measure, str] = {}
    if not embedders:
        missing |= dict.fromkeys(_OF_TOWER, "no image tower; set evaluation.evaluators")
    elif len(images.subject[CONCEPT].seeds) < 2:
        missing[measures.DIVERSITY] = "one image per prompt; raise evaluation.images_per_prompt"
    if not images.views:
        missing[measures.SIMILARITY_UNSEEN] = "no further pictures of the subject; set evaluation.views"
    if text_image is None:
        reason = "no model with a text tower; set evaluation.text_image_model to clip: or siglip:FOLDER_OR_HUB_ID"
        missing |= dict.fromkeys(_OF_TEXT_TOWER, reason)
    if not color_agreement:
        reason = "the colour words are those of the embedded base model; see evaluation.color_agreement"
        missing |= dict.fromkeys((measures.BACKGROUND, measures.COLOR), reason)
    if recognizer is None:
        missing[measures.RECOGNITION] = "no judge beside the base model, or evaluation.recognition is false"
    return {(one.name, ""): reason for one, reason in missing.items()}


_OF_TOWER = (
    *(measures.SIMILARITY, measures.SIMILARITY_WHOLE, measures.SIMILARITY_COLORLESS, measures.DIVERSITY),
    *(measures.CROP_DISTANCE, measures.EFFECT_SIMILARITY, measures.GUIDANCE_SIMILARITY),
)
_OF_TEXT_TOWER = (measures.CLIP_SCORE, measures.EFFECT_AGREEMENT, measures.GUIDANCE_AGREEMENT)


class _Task:
    """Measures in progress: the results so far, and the rows of the images, which get a column per measure."""

    def __init__(self, images: EvaluationImages) -> None:
        self.images = images
        self.results: list[Result] = []
        self.spreads: dict[str, float] = {}
        self.rows = {group: _rows("subject", group, drawings) for group, drawings in images.subject.items()}
        self.prior_rows = _rows("prior", CONCEPT, images.prior[CONCEPT])
        pictures = {REFERENCE: images.reference, CEILING: images.reconstruction}
        self.groups = {**images.subject, **{name: Drawings.of_picture(one) for name, one in pictures.items()}}

    def add(
        self, measure: Measure, group: str, by: str, drawings: Drawings, values: Tensor, condition: str = ""
    ) -> None:
        """Add an estimate of values `[N]`, in the order of `drawings.flat`; none if all are NaN."""
        grid = drawings.grid(values)
        if count := int((~grid.isnan()).sum()):
            estimate = bootstrap_grid(grid, measure.statistic)
            self.results.append(Result(measure, group, by, estimate, count, condition))

    def add_column(self, rows: Sequence[TableRow], name: str, values: Tensor) -> None:
        """Add values `[N]` to the rows of the images."""
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = value

    def measure_by(self, embedder: Embedder) -> None:
        """Add fidelity, diversity, copying, drift, and effects of branch and guidance by one image tower."""
        label, images = embedder.label, self.images
        against = SubjectMeasures.of(embedder, images.reference, images.views)
        for group, drawings in self.groups.items():
            pictures = against.embed(drawings.flat(), drawings.flat_templates())
            values = against.fidelity(pictures) | {
                measures.COPYING.name: similarity(pictures.whole, against.reference.whole[0]),
                measures.CROP_DISTANCE.name: against.crop_distance(pictures),
            }
            for one in measures.MEASURES:
                if one.name in values:
                    self.add(one, group, label, drawings, values[one.name])
                    if group in self.rows:
                        column = f"{label}/{one.name.rpartition('/')[-1]}"
                        self.add_column(self.rows[group], column, values[one.name])
            if group in self.rows:
                deviation = float(values[measures.SIMILARITY.name].std(correction=0))
                self.spreads[f"similarity_std/{group}.{label}"] = deviation
                self._add_diversity(group, label, drawings, pictures.whole)
        before, after = (self.images.prior[group].flat() for group in (BASE, CONCEPT))
        drift = measures.drift(embedder, before, after)
        self.add(measures.PRIOR_DRIFT, CONCEPT, label, images.prior[CONCEPT], drift)
        self.add_column(self.prior_rows, f"{label}/drift", drift)
        self._measure_conditions(against)

    def _add_diversity(self, group: str, label: str, drawings: Drawings, whole: Tensor) -> None:
        num_seeds = len(drawings.seeds)
        if num_seeds > 1:
            distances = pairwise_distances(whole.reshape(-1, num_seeds, whole.shape[-1]))  # [P, S, S]
            estimate = bootstrap_pairs(distances)
            self.results.append(Result(measures.DIVERSITY, group, label, estimate, len(whole)))

    def _measure_conditions(self, against: SubjectMeasures) -> None:
        """Add what each part of the negative branch, and the guidance scale, changes in the concept's images."""
        label = against.embedder.label

        def fidelity(drawings: Drawings) -> Tensor:
            return against.object_similarity(drawings.flat(), drawings.flat_templates())

        for part, ablation in self.images.branches.items():
            present, absent = ablation.present, ablation.absent
            distance = measures.drift(against.embedder, absent.flat(), present.flat())
            self.add(measures.EFFECT_DISTANCE, CONCEPT, label, present, distance, part)
            self.add(measures.EFFECT_SIMILARITY, CONCEPT, label, present, fidelity(present) - fidelity(absent), part)
        for scale, drawings in self.images.guidance.items():
            self.add(measures.GUIDANCE_SIMILARITY, CONCEPT, label, drawings, fidelity(drawings), f"{scale:g}")

    def measure_pixels(self) -> None:
        """Add copying, leakage of the background, drift and effects of the branches by pixels."""
        reference = self.images.reference
        for group, drawings in self.groups.items():
            pictures = drawings.flat()
            copying = tensor([1 - image_distance(one.resize(reference.size), reference) for one in pictures])
            leakage = measures.background_leakage(pictures, reference)
            self.add(measures.COPYING, group, PIXELS, drawings, copying)
            self.add(measures.BACKGROUND_LEAKAGE, group, PIXELS, drawings, leakage)
            if group in self.rows:
                self.add_column(self.rows[group], "copying_pixels", copying)
                self.add_column(self.rows[group], "background_leakage", leakage)
        prior = self.images.prior
        drift = _pixel_distances(prior[BASE], prior[CONCEPT])
        self.add(measures.PRIOR_DRIFT, CONCEPT, PIXELS, prior[CONCEPT], drift)
        self.add_column(self.prior_rows, "drift_pixels", drift)
        for part, ablation in self.images.branches.items():
            distance = _pixel_distances(ablation.present, ablation.absent)
            self.add(measures.EFFECT_DISTANCE, CONCEPT, PIXELS, ablation.present, distance, part)

    def measure_agreement(self, scorer: TextImageScorer) -> None:
        """Add the text-image score of every group, branch and guidance scale.

        Reference and reconstruction are compared with every prompt: this is what copies of them reach.
        """

        def scores(drawings: Drawings) -> Tensor:
            texts = measures.prompt_texts(drawings.flat_templates(), self.images.class_word)
            return scorer.score(drawings.flat(), texts)

        for group, drawings in self.groups.items():
            shown = drawings if group in self.rows else self._for_every_prompt(drawings)
            values = scores(shown)
            self.add(scorer.measure, group, "", shown, values)
            if group in self.rows:
                self.add_column(self.rows[group], scorer.measure.name.rpartition("/")[-1], values)
        for part, ablation in self.images.branches.items():
            gain = scores(ablation.present) - scores(ablation.absent)
            self.add(measures.EFFECT_AGREEMENT, CONCEPT, "", ablation.present, gain, part)
        for scale, drawings in self.images.guidance.items():
            self.add(measures.GUIDANCE_AGREEMENT, CONCEPT, "", drawings, scores(drawings), f"{scale:g}")

    def _for_every_prompt(self, drawings: Drawings) -> Drawings:
        """Return one picture as if it were drawn from each prompt."""
        templates = self.images.subject[BASE].templates
        return Drawings(templates, templates, drawings.seeds, [drawings.images[0]] * len(templates))

    def measure_colors(self) -> None:
        """Add the colours of prompt and image to each row, and the shares that agree."""
        for group, drawings in self.groups.items():
            shown = drawings if group in self.rows else self._for_every_prompt(drawings)
            whole = group not in self.rows
            answers = [_agreement(template, image, whole) for template, _, _, image in shown.cells()]
            for row, answer in zip(self.rows.get(group, ()), answers, strict=False):
                row.update(answer)
            for name, one in (("background", measures.BACKGROUND), ("color", measures.COLOR)):
                agrees = [answer[f"{name}_agrees"] for answer in answers]
                values = tensor([math.nan if value is None else float(value) for value in agrees])
                self.add(one, group, "", shown, values)

    def measure_recognition(self, recognizer: Recognizer) -> None:
        """Add whether the classifier recognises the subject in each image."""
        images = self.images
        for group, drawings in self.groups.items():
            target, values = measures.recognized(recognizer, drawings.flat(), images.reference, images.class_word)
            self.add(measures.RECOGNITION, group, recognizer.label, drawings, values)
            if group in self.rows:
                self.add_column(self.rows[group], "recognized", values)
                for row in self.rows[group]:
                    row["recognition_target"] = target


def _rows(kind: str, group: str, drawings: Drawings) -> list[TableRow]:
    return [{"kind": kind, "group": group, "prompt": prompt, "seed": seed} for _, prompt, seed, _ in drawings.cells()]


def _pixel_distances(first: Drawings, second: Drawings) -> Tensor:
    pairs = zip(first.flat(), second.flat(), strict=True)
    return tensor([image_distance(one, other) for one, other in pairs])


def _agreement(template: str, image: Image.Image, whole: bool) -> TableRow:
    """Compare the colours in a prompt with those of its image; agreement is None without a colour in the prompt.

    Args:
        template: the prompt, with its slots.
        image: drawn from it.
        whole: whether the object is looked for in the whole image, also where the prompt names a side.
    """
    backgrounds, color = colors.asked_backgrounds(template), colors.asked_object_color(template)
    seen_background = colors.background_color(image)
    seen_color = colors.object_color(image if whole else subject_part(image, template))
    return {
        "background_asked": " or ".join(backgrounds),
        "background_seen": seen_background,
        "background_agrees": seen_background in backgrounds if backgrounds else None,
        "color_asked": color or "",
        "color_seen": seen_color,
        "color_agrees": seen_color == color if color else None,
    }
