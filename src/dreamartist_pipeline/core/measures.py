"""What is measured on drawn pictures, defined once, and the measures of single pictures against one reference.

`MEASURES` is the table of docs/measures.md. All functions take pictures and models that are handed in, and return one
value per picture; intervals.py makes estimates of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from PIL import Image

from dreamartist_pipeline.core.captions import fill_template, slot_names
from dreamartist_pipeline.core.intervals import Statistic
from dreamartist_pipeline.core.metrics import (
    background_histogram,
    crops,
    embedding_distance,
    histogram_intersection,
    luminance,
    nearest_distance,
    object_region,
    similarity,
    subject_part,
)

Direction = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Measure:
    """Definition of a measure.

    Attributes:
        name: prefix of its metrics; see `metric_key`.
        title: for tables.
        formula: what it is, with the cosine cos, an image tower f, the picture x and the reference r.
        better: which values are better.
        unit: of a value.
        bounds: smallest and largest possible value.
        source: where the definition is from.
        needs: what it is measured with, or what it requires.
        caveat: what it does not show.
        statistic: of the values of all pictures.
        by_definition: floor or ceilings that need no picture: base, reference or ceiling -> value.
    """

    name: str
    title: str
    formula: str
    better: Direction
    unit: str
    bounds: tuple[float, float]
    source: str
    needs: str
    caveat: str
    statistic: Statistic = "mean"
    by_definition: Mapping[str, float] = field(default_factory=dict, hash=False)


SIMILARITY = Measure(
    name="similarity",
    title="fidelity, object alone",
    formula="cos(f(o(x)), f(o(r))); o: the object, cut out on white",
    better="higher",
    unit="cosine",
    bounds=(-1, 1),
    source="CLIP-I and DINO of Ruiz et al. 2023 (DreamBooth), with the object cut out",
    needs="image tower",
    caveat="without a plain background, the object is the whole picture; the highest value is a copy of the reference",
)
SIMILARITY_WHOLE = Measure(
    name="similarity_whole",
    title="fidelity, whole picture",
    formula="cos(f(x), f(r))",
    better="higher",
    unit="cosine",
    bounds=(-1, 1),
    source="CLIP-I and DINO of Ruiz et al. 2023 (DreamBooth)",
    needs="image tower",
    caveat="falls where a prompt asks for another background or place than the reference has",
)
SIMILARITY_COLORLESS = Measure(
    name="similarity_colorless",
    title="fidelity, colour-free",
    formula="cos(f(g(o(x))), f(g(o(r)))); g: luminance (ITU-R 601)",
    better="higher",
    unit="cosine",
    bounds=(-1, 1),
    source="as `similarity`, without the colours that prompts change",
    needs="image tower",
    caveat="grey pictures are rare in the training of most towers",
)
SIMILARITY_UNSEEN = Measure(
    name="similarity_unseen",
    title="fidelity to unseen views",
    formula="mean over views v of cos(f(o(x)), f(o(v)))",
    better="higher",
    unit="cosine",
    bounds=(-1, 1),
    source="as `similarity`; the views are pictures that the training has not seen",
    needs="image tower; evaluation.views",
    caveat="comparable between concepts of one subject only",
)
RECOGNITION = Measure(
    name="recognition",
    title="recognition",
    formula="share of pictures in which the judge names the class word; if it does not know it, what it names for r",
    better="higher",
    unit="share",
    bounds=(0, 1),
    source="top-1 accuracy of a classifier",
    needs="judge beside the embedded base model",
    caveat="for a subject that the judge does not know, being taken for the same object as the reference",
)
CLIP_SCORE = Measure(
    name="prompt/clip_score",
    title="prompt agreement, CLIP",
    formula="2.5 · max(cos(f(x), t(p)), 0); t: text tower, p: the prompt with the class word",
    better="higher",
    unit="score",
    bounds=(0, 2.5),
    source="Hessel et al. 2021, eq. 1, without the prefix “A photo depicts”",
    needs="text tower",
    caveat="the base model with the class word is what can be expected; values of different towers do not compare",
)
SIGLIP_SCORE = Measure(
    name="prompt/siglip_score",
    title="prompt agreement, SigLIP",
    formula="sigmoid(a · cos(f(x), t(p)) + b), with the scale a and bias b of the model",
    better="higher",
    unit="probability",
    bounds=(0, 1),
    source="Zhai et al. 2023",
    needs="text tower (SigLIP)",
    caveat="as of `prompt/clip_score`; near 0 or 1 for most pictures",
)
BACKGROUND = Measure(
    name="prompt/background",
    title="background as in the prompt",
    formula="share of pictures whose border has the colour that the prompt names for the background",
    better="higher",
    unit="share",
    bounds=(0, 1),
    source="nearest of 12 named colours in CIELAB (embedded/colors.py)",
    needs="colour words of the embedded base model",
    caveat="prompts without such a colour do not count",
)
COLOR = Measure(
    name="prompt/color",
    title="object colour as in the prompt",
    formula="share of pictures whose object has the colour that the prompt names for it",
    better="higher",
    unit="share",
    bounds=(0, 1),
    source="nearest of 12 named colours in CIELAB (embedded/colors.py)",
    needs="colour words of the embedded base model",
    caveat="prompts without such a colour do not count",
)
DIVERSITY = Measure(
    name="variety/diversity",
    title="diversity",
    formula="mean over the pairs of seeds of a prompt of 1 - cos(f(x), f(x'))",
    better="higher",
    unit="distance",
    bounds=(0, 2),
    source="as the LPIPS diversity of Zhu et al. 2017 and the DIV of Ruiz et al. 2023, with the tower's distance",
    needs="image tower; two seeds",
    caveat="noise and failures are diverse, too",
    by_definition={"reference": 0.0, "ceiling": 0.0},
)
COPYING = Measure(
    name="variety/copying",
    title="copying, whole picture",
    formula="max over pictures of cos(f(x), f(r)); pixels: of 1 - mean |x - r|",
    better="lower",
    unit="similarity",
    bounds=(-1, 1),
    source="nearest training image by embedding (Somepalli et al. 2023), of one training image",
    needs="image tower, or pixels",
    caveat="grows with the number of pictures; the interval of a maximum reaches down only",
    statistic="max",
)
CROP_DISTANCE = Measure(
    name="copying/crop_distance",
    title="copying, nearest crop",
    formula="min over crops c of 1 - cos(f(x), f(c)); crops: r, and 3 × 3 crops of 3/4 and of 1/2 of its sides",
    better="higher",
    unit="distance",
    bounds=(0, 2),
    source="nearest training image by embedding (Somepalli et al. 2023), over crops of the one training image",
    needs="image tower",
    caveat="a faithful object in a new scene is nearer than the floor, without being copied",
)
BACKGROUND_LEAKAGE = Measure(
    name="copying/background",
    title="copying, background",
    formula="Σ min(h(x), h(r)); h: histogram of the background's RGB values, 8 × 8 × 8 bins, linear votes",
    better="lower",
    unit="share",
    bounds=(0, 1),
    source="histogram intersection (Swain & Ballard 1991), of the backgrounds",
    needs="pixels",
    caveat="compare with the base model: prompts may ask for the reference's background; without a plain background, "
    "the outer eighth on each side counts",
)
PRIOR_DRIFT = Measure(
    name="prior_drift",
    title="prior drift",
    formula="1 - cos(f(x), f(b)); pixels: mean |x - b|; b: the base model's picture of the same prompt and seed",
    better="lower",
    unit="distance",
    bounds=(0, 2),
    source="change of the prior that prior preservation keeps (Ruiz et al. 2023), by paired seeds",
    needs="image tower, or pixels",
    caveat="prompts without the trigger word; another, equally good picture is a drift, too",
    by_definition={"base": 0.0},
)
EFFECT_DISTANCE = Measure(
    name="effect/distance",
    title="effect of a branch on the picture",
    formula="1 - cos(f(x), f(y)); pixels: mean |x - y|; x with and y without it, of the same prompt and seed",
    better="neither",
    unit="distance",
    bounds=(0, 2),
    source="ablation with paired seeds",
    needs="image tower, or pixels; a negative adapter or word",
    caveat="0: the branch changes nothing",
    by_definition={"base": 0.0},
)
EFFECT_SIMILARITY = Measure(
    name="effect/similarity",
    title="effect of a branch on fidelity",
    formula="similarity(x) - similarity(y), x with and y without it",
    better="higher",
    unit="cosine",
    bounds=(-2, 2),
    source="ablation with paired seeds",
    needs="image tower; a negative adapter or word",
    caveat="above 0: the branch helps",
    by_definition={"base": 0.0},
)
EFFECT_AGREEMENT = Measure(
    name="effect/agreement",
    title="effect of a branch on prompt agreement",
    formula="agreement(x) - agreement(y), x with and y without it; CLIP or SigLIP score",
    better="higher",
    unit="score",
    bounds=(-2.5, 2.5),
    source="ablation with paired seeds",
    needs="text tower; a negative adapter or word",
    caveat="above 0: the branch helps",
    by_definition={"base": 0.0},
)
GUIDANCE_SIMILARITY = Measure(
    name="guidance/similarity",
    title="fidelity by guidance scale",
    formula="similarity at each of evaluation.guidance_scales and at the sampler's scale, same seeds",
    better="higher",
    unit="cosine",
    bounds=(-1, 1),
    source="sweep of the guidance scale (Ho & Salimans 2022)",
    needs="image tower",
    caveat="fewer pictures than `similarity`",
)
GUIDANCE_AGREEMENT = Measure(
    name="guidance/agreement",
    title="prompt agreement by guidance scale",
    formula="agreement at each of evaluation.guidance_scales and at the sampler's scale, same seeds",
    better="higher",
    unit="score",
    bounds=(0, 2.5),
    source="sweep of the guidance scale (Ho & Salimans 2022)",
    needs="text tower",
    caveat="fewer pictures than `prompt/clip_score`",
)

MEASURES: tuple[Measure, ...] = (
    *(SIMILARITY, SIMILARITY_WHOLE, SIMILARITY_COLORLESS, SIMILARITY_UNSEEN, RECOGNITION),
    *(CLIP_SCORE, SIGLIP_SCORE, BACKGROUND, COLOR, DIVERSITY),
    *(COPYING, CROP_DISTANCE, BACKGROUND_LEAKAGE, PRIOR_DRIFT),
    *(EFFECT_DISTANCE, EFFECT_SIMILARITY, EFFECT_AGREEMENT, GUIDANCE_SIMILARITY, GUIDANCE_AGREEMENT),
)


def metric_key(measure: Measure, *parts: str) -> str:
    """Return the name of a metric, such as "similarity/concept.dinov2" or "variety/diversity.base.dinov2".

    Args:
        measure: what is measured.
        parts: where and by what, in this order; "" for a part that does not apply.
    """
    separator = "." if "/" in measure.name else "/"
    return separator.join(filter(None, (measure.name, ".".join(filter(None, parts)))))


# ------------------------------------------------------------------------------------------- models that measure


class Embedder(Protocol):
    """Interface of an image tower."""

    @property
    def label(self) -> str:
        """Its name in metrics and columns."""

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return embeddings `[N, D]` with rows of length 1."""


class TextImageScorer(Protocol):
    """Interface of a model that compares images with texts."""

    @property
    def measure(self) -> Measure:
        """What its scores are."""

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """Return how well each image fits its text `[N]`."""


class Recognizer(Protocol):
    """Interface of a classifier of objects."""

    @property
    def label(self) -> str:
        """Its name in metrics."""

    @property
    def known(self) -> Sequence[str]:
        """The objects that it tells apart."""

    def objects_in(self, images: Sequence[Image.Image]) -> list[tuple[str, ...]]:
        """Return the objects that it names for each image, the main one first."""


# ------------------------------------------------------------------------------------------- single pictures


def cut_out_objects(images: Sequence[Image.Image], templates: Sequence[str] = ()) -> list[Image.Image]:
    """Return the object of each picture, cut out on white.

    Args:
        images: the pictures.
        templates: the prompt of each, with its '{pt1}' slot: the side that it names for the subject is looked at alone.
    """
    parts = zip(images, templates or [""] * len(images), strict=True)
    return [object_region(subject_part(image, template)) for image, template in parts]


@dataclass(frozen=True)
class PictureEmbeddings:
    """Embeddings of pictures by one image tower, each float32 `[N, D]`.

    Attributes:
        whole: of the pictures.
        object: of the object alone.
        colorless: of the luminance of the object alone.
    """

    whole: torch.Tensor
    object: torch.Tensor
    colorless: torch.Tensor

    @classmethod
    def of(cls, embedder: Embedder, images: Sequence[Image.Image], templates: Sequence[str] = ()) -> PictureEmbeddings:
        """Embed pictures.

        Args:
            embedder: the image tower.
            images: the pictures.
            templates: see `cut_out_objects`.
        """
        objects = cut_out_objects(images, templates)
        whole, alone, colorless = embedder.embed([*images, *objects, *map(luminance, objects)]).chunk(3)
        return cls(whole, alone, colorless)


@dataclass(frozen=True)
class SubjectMeasures:
    """The measures of pictures against one reference, by one image tower; every value is that of one picture.

    Attributes:
        embedder: the image tower.
        reference: of the one picture.
        crops: of its crops, `[K, D]`.
        unseen: of the objects in other views of the subject, `[V, D]`, or None without any.
    """

    embedder: Embedder
    reference: PictureEmbeddings
    crops: torch.Tensor
    unseen: torch.Tensor | None = None

    @classmethod
    def of(cls, embedder: Embedder, reference: Image.Image, unseen: Sequence[Image.Image] = ()) -> SubjectMeasures:
        """Embed the reference once, and further views of the subject."""
        views = embedder.embed(cut_out_objects(unseen)) if unseen else None
        return cls(embedder, PictureEmbeddings.of(embedder, [reference]), embedder.embed(crops(reference)), views)

    def embed(self, images: Sequence[Image.Image], templates: Sequence[str] = ()) -> PictureEmbeddings:
        """Embed pictures, for the measures below; see `PictureEmbeddings.of`."""
        return PictureEmbeddings.of(self.embedder, images, templates)

    def fidelity(self, pictures: PictureEmbeddings) -> dict[str, torch.Tensor]:
        """Return name of the measure -> values `[N]`."""
        values = {
            SIMILARITY.name: similarity(pictures.object, self.reference.object[0]),
            SIMILARITY_WHOLE.name: similarity(pictures.whole, self.reference.whole[0]),
            SIMILARITY_COLORLESS.name: similarity(pictures.colorless, self.reference.colorless[0]),
        }
        if self.unseen is not None:
            to_views = [similarity(pictures.object, view) for view in self.unseen]
            values[SIMILARITY_UNSEEN.name] = torch.stack(to_views).mean(dim=0)
        return values

    def object_similarity(self, images: Sequence[Image.Image], templates: Sequence[str] = ()) -> torch.Tensor:
        """Return `similarity` of each picture, with one embedding each: float32 `[N]`."""
        return similarity(self.embedder.embed(cut_out_objects(images, templates)), self.reference.object[0])

    def crop_distance(self, pictures: PictureEmbeddings) -> torch.Tensor:
        """Return the distance of each picture to the nearest crop of the reference: float32 `[N]`."""
        return nearest_distance(pictures.whole, self.crops)


def prompt_texts(templates: Sequence[str], class_word: str) -> list[str]:
    """Return the texts that pictures are compared with: their prompts, the class word in place of the trigger word."""
    return [fill_template(template, dict.fromkeys(slot_names(template), class_word)) for template in templates]


def background_leakage(images: Sequence[Image.Image], reference: Image.Image) -> torch.Tensor:
    """Return what the background of each picture has in common with that of the reference: float32 `[N]` in 0..1."""
    own = background_histogram(reference)
    return torch.tensor([histogram_intersection(background_histogram(image), own) for image in images])


def drift(embedder: Embedder, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> torch.Tensor:
    """Return the distance of each picture to that of another model, of the same prompt and seed: float32 `[N]`."""
    return embedding_distance(embedder.embed(before), embedder.embed(after))


def recognized(
    recognizer: Recognizer, images: Sequence[Image.Image], reference: Image.Image, class_word: str
) -> tuple[str, torch.Tensor]:
    """Return the object that pictures should show, and whether each one does: float32 `[N]`, 0 or 1.

    The object is the class word, or, if the classifier does not know it, the one that it names for the reference.
    """
    named, *others = recognizer.objects_in([reference, *images])
    target = class_word if class_word in recognizer.known else named[0]
    return target, torch.tensor([float(target in objects) for objects in others])
