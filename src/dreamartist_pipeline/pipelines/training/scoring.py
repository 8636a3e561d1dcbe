"""Score a running training, and keep the concepts of scored steps; `core.choosing` chooses one of them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pandas import DataFrame
from PIL.Image import Image

from dreamartist_pipeline.backbones.base_model import with_zero_terminal_snr
from dreamartist_pipeline.backbones.concepts import LoadedConcept, NewConcept, generate
from dreamartist_pipeline.backbones.evaluators import (
    Evaluator,
    TextImageModel,
    load_evaluator,
    load_evaluators,
    load_text_image_model,
    own_towers,
)
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.placement import on_device
from dreamartist_pipeline.backbones.prompts import PromptEncoder
from dreamartist_pipeline.core.captions import branch_prompts, without_weights
from dreamartist_pipeline.core.checkpoints import Checkpoint
from dreamartist_pipeline.core.choosing import (
    Bounds,
    Choice,
    Score,
    choose_step,
    has_stalled,
    most_kept,
    rows_of_scores,
    standing,
    thinned,
)
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.course import Checkpointing
from dreamartist_pipeline.core.halving import Halving
from dreamartist_pipeline.core.measures import (
    SIMILARITY,
    PictureEmbeddings,
    SubjectMeasures,
    background_leakage,
    drift,
)
from dreamartist_pipeline.core.metrics import copying_share, pairwise_distances
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.core.validation import Validation
from dreamartist_pipeline.embedded.agreement import prompt_agreement
from dreamartist_pipeline.params import ScoringParams, TrainingParams
from dreamartist_pipeline.pipelines.training.trainable import idle_modules

_SMALLEST = 1e-6  # of what is divided by
_SCORING = "scoring"  # key in a checkpoint
Tensors = dict[str, torch.Tensor]
"""The tensors of a concept."""

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Judges:
    """What compares images.

    Attributes:
        images: embeds images.
        texts: scores images and texts; None: agreement is not measured, unless colours are read.
        reads_colors: whether backgrounds named in prompts are compared with the pixels.
    """

    images: Evaluator
    texts: TextImageModel | None
    reads_colors: bool

    @classmethod
    def load(cls, base_model: ModelLocation, params: ScoringParams, device: torch.device) -> Judges:
        """Load the evaluators of a training.

        Raises:
            InputError: see `load_evaluator`.
        """
        named = load_evaluators([params.evaluator], base_model, device)
        return cls(
            images=named[0] if named else load_evaluator("efficientnet-lite0", device),
            texts=load_text_image_model(params.text_image_model, base_model, device),
            reads_colors=own_towers(base_model) is not None,
        )

    def agreement(self, templates: Sequence[str], images: Sequence[Image], class_word: str) -> float | None:
        """Return how well images fit their prompts; see `prompt_agreement`."""
        return prompt_agreement(templates, images, class_word, self.texts, self.reads_colors)


class ImageMeasures:
    """Fidelity, agreement, drift and copying of drawn images.

    Attributes:
        floor: the values of the base model by name: fidelity, and agreement if it is measured.
    """

    def __init__(self, judges: Judges, reference: Image, params: TrainingParams, base: Sequence[Image]) -> None:
        """Measure the base model's images.

        Args:
            judges: of the training.
            reference: the prepared image.
            params: of the training.
            base: the base model's images of all prompts, in the order of `images_of`.
        """
        self._judges, self._reference, self._class_word = judges, reference, params.class_word
        self._subject = SubjectMeasures.of(judges.images, reference)
        plain = [without_weights(prompt, params.words.names) for prompt in params.scoring.prompts]
        self._templates = [template for template in plain for _ in range(params.scoring.images_per_prompt)]
        images, self._base_prior = self._split(base)
        pictures = self._subject.embed(images, self._templates)
        self._base_distance = float(self._subject.crop_distance(pictures).mean())
        self._base_leakage = float(background_leakage(images, reference).mean())
        distances = pairwise_distances(judges.images.embed(self._base_prior))
        self._spread = _mean_off_diagonal(distances)
        self.floor = {"fidelity": self._fidelity(pictures)}
        if (agreement := self._agreement(images)) is not None:
            self.floor["agreement"] = agreement

    def __call__(self, step: int, images: Sequence[Image], losses: tuple[float, float | None]) -> Score:
        """Return the score of a step.

        Args:
            step: of the training.
            images: of all prompts, drawn after the step.
            losses: of the validation.
        """
        images, prior = self._split(images)
        pictures = self._subject.embed(images, self._templates)
        return Score(
            step,
            fidelity=self._fidelity(pictures),
            agreement=self._agreement(images),
            drift=float(drift(self._judges.images, self._base_prior, prior).mean()) / self._spread,
            copying=self._copying(images, pictures),
            loss_reference=losses[0],
            loss_regularization=losses[1],
        )

    def _split(self, images: Sequence[Image]) -> tuple[Sequence[Image], Sequence[Image]]:
        return images[: len(self._templates)], images[len(self._templates) :]

    def _fidelity(self, pictures: PictureEmbeddings) -> float:
        return float(self._subject.fidelity(pictures)[SIMILARITY.name].mean())

    def _agreement(self, images: Sequence[Image]) -> float | None:
        return self._judges.agreement(self._templates, images, self._class_word)

    def _copying(self, images: Sequence[Image], pictures: PictureEmbeddings) -> float:
        """Return the mean over images of `metrics.copying_share`."""
        distances, leakage = self._subject.crop_distance(pictures), background_leakage(images, self._reference)
        return float(copying_share(distances, leakage, self._base_distance, self._base_leakage).mean())


def _mean_off_diagonal(distances: torch.Tensor) -> float:
    """Return the mean of `[N, N]` off its diagonal; 1 for a single row, or if all are 0."""
    size = len(distances)
    return float(distances.sum()) / (size * (size - 1)) if size > 1 and distances.sum() > _SMALLEST else 1.0


def images_of(
    backbone: Backbone,
    loaded: LoadedConcept,
    params: TrainingParams,
    words: Mapping[str, tuple[str, str]],
    size_px: tuple[int, int],
) -> list[Image]:
    """Draw every prompt with every seed, then every prior prompt with one.

    Args:
        backbone: that `loaded` is attached to.
        loaded: the concept, or the base model.
        params: of the training.
        words: slot -> trigger words; slots without one get the class word.
        size_px: (width, height) of the reference image.
    """
    scoring = params.scoring
    seeds = range(scoring.seed, scoring.seed + scoring.images_per_prompt)
    rows = [(prompt, seed) for prompt in scoring.prompts for seed in seeds]
    rows += [(prompt, scoring.seed) for prompt in scoring.prior_prompts]
    prompts = [branch_prompts(prompt, words, params.class_word)[1] for prompt, _ in rows]
    drawn_seeds = [seed for _, seed in rows]
    return generate(backbone, loaded, prompts, "", drawn_seeds, scoring.sampler, size_px=size_px)


def base_images(backbone: Backbone, params: TrainingParams, size_px: tuple[int, int]) -> list[Image]:
    """Draw the images of `images_of` with the base model."""
    own = with_zero_terminal_snr(backbone) if params.zero_terminal_snr else backbone
    loaded = LoadedConcept(own, PromptEncoder(own, clip_skip=params.clip_skip), {})
    return images_of(own, loaded, params, {}, size_px)


# ------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class ScoredTraining:
    """The result of scoring.

    Attributes:
        choice: the chosen step.
        rows: a table, one row per scored step.
        kept: step -> tensors of its concept, with those of the chosen step and the last.
    """

    choice: Choice
    rows: list[dict[str, float]]
    kept: dict[int, Tensors]


class Scorer:
    """Scores a training after some steps, on rank 0, and keeps concepts.

    Scores and concepts are part of the checkpoints, so that a continued training chooses as an uninterrupted one.
    """

    def __init__(
        self,
        new: NewConcept,
        params: TrainingParams,
        measures: ImageMeasures,
        validation: Validation,
        size_px: tuple[int, int],
        tracker: Tracker,
    ) -> None:
        """Score nothing yet.

        Args:
            new: the concept in training.
            params: of the training.
            measures: of the images.
            validation: of the losses.
            size_px: of the images.
            tracker: of the run.
        """
        self._new, self._params, self._tracker = new, params, tracker
        self._measures, self._validation, self._size_px = measures, validation, size_px
        self._bounds = Bounds.of(params.scoring, measures.floor.get("agreement"))
        self._halving = Halving(params.scoring.halving) if params.scoring.halving else None
        self._scores: list[Score] = []
        self._kept: dict[int, Tensors] = {}
        self.seconds = 0.0  # also of the base model's images, and before an interruption

    @property
    def is_over(self) -> bool:
        """Whether the training stops before its last step."""
        if not self._scores:
            return False
        has_lost = self._halving is not None and self._halving.is_stopped(self._scores[-1].step)
        return has_lost or has_stalled(self._scores, self._best, self._params.scoring.patience)

    def __call__(self, step: int) -> bool:
        """Score the current values after a step, and return `is_over`.

        A training that went back to a good state scores some steps again; later scores are forgotten.
        """
        started = time.perf_counter()
        self._forget_from(step)
        new, params = self._new, self._params
        with on_device(idle_modules(new, params), new.backbone.device), new.drawing(params.words.names) as loaded:
            images = images_of(new.backbone, loaded, params, params.words.names, self._size_px)
            losses = self._validation.losses()
        score = self._measures(step, images, losses)
        self._scores.append(score)
        self._keep(step, new.tensors())
        if self._halving is not None:
            self._halving.note(step, standing(self._scores, self._bounds))
        self._tracker.log_metrics({f"scoring/{name}": value for name, value in score.values().items()}, step=step)
        self.seconds += time.perf_counter() - started
        return self.is_over

    def result(self) -> ScoredTraining | None:
        """Return the choice among the kept steps; None without any."""
        if not self._scores:
            return None
        last = self._scores[-1].step
        choice = self._best if self._params.choose == "best" else Choice(last, "it is the last, by training.choose")
        rows = rows_of_scores(self._scores, self._bounds, self._measures.floor, choice.step)
        return ScoredTraining(choice, rows, dict(self._kept))

    @property
    def _best(self) -> Choice:
        """The best of the kept steps."""
        return choose_step([score for score in self._scores if score.step in self._kept], self._bounds)

    def _keep(self, step: int, tensors: Tensors) -> None:
        self._kept[step] = tensors
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        kept = thinned(self._kept, {step, self._best.step}, most_kept(size))
        self._kept = {each: self._kept[each] for each in kept}

    def _forget_from(self, step: int) -> None:
        self._scores = [score for score in self._scores if score.step < step]
        self._kept = {kept: tensors for kept, tensors in self._kept.items() if kept < step}

    # --------------------------------------------------------------------------------------------- checkpoints

    def kept_in(self, checkpointing: Checkpointing) -> Checkpointing:
        """Continue with the scores of the resumed checkpoint, and return `checkpointing` with the scores saved, too."""
        if checkpointing.resumed:
            self._continue(checkpointing.resumed.get(_SCORING), checkpointing.resumed["state"]["step"])

        def save(checkpoint: Checkpoint) -> None:
            checkpointing.save(checkpoint | {_SCORING: self._saved()})

        return replace(checkpointing, save=save)

    def _continue(self, saved: dict[str, Any] | None, last_step: int) -> None:
        """Take over scores of the same settings; those of a diverged training may be of later steps."""
        if saved is None or saved["settings"] != self._settings():
            return
        self.seconds += saved["seconds"]
        self._scores = [Score(**score) for score in saved["scores"]]
        self._kept = {step: dict(tensors) for step, tensors in saved["kept"].items()}
        self._forget_from(last_step + 1)
        for score in self._scores:
            self._tracker.log_metrics({f"scoring/{name}": value for name, value in score.values().items()}, score.step)

    def _saved(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "scores": [dataclasses.asdict(score) for score in self._scores],
            "kept": self._kept,
            "seconds": self.seconds,
        }

    def _settings(self) -> dict[str, Any]:
        return self._params.scoring.model_dump(mode="json", exclude={"patience", "halving"})


def make_scorer(
    new: NewConcept,
    base: Backbone,
    base_model: ModelLocation,
    reference: Image,
    params: TrainingParams,
    validation: Validation,
    tracker: Tracker,
) -> Scorer:
    """Draw and measure the base model's images, and return what scores a training.

    Args:
        new: the concept in training.
        base: the base model without it.
        base_model: its location.
        reference: the prepared image, which gives the images their size.
        params: of the training.
        validation: of the losses.
        tracker: of the run.

    Raises:
        InputError: see `load_evaluator`.
    """
    started = time.perf_counter()
    judges = Judges.load(base_model, params.scoring, base.device)
    measures = ImageMeasures(judges, reference, params, base_images(base, params, reference.size))
    if "agreement" not in measures.floor:
        log.info(
            "Agreement with prompts is not measured, because there is no CLIP model for %s "
            "(training.scoring.text_image_model=clip:FOLDER_OR_HUB_ID).",
            base.name,
        )
    scorer = Scorer(new, params, measures, validation, reference.size, tracker)
    scorer.seconds = time.perf_counter() - started
    return scorer


# ------------------------------------------------------------------------------------------------- the result


def chosen_concept(
    trained: Concept, scored: ScoredTraining | None, params: TrainingParams, tracker: Tracker
) -> tuple[Concept, dict[int, Concept]]:
    """Return the concept of the chosen step, and step -> concept of all that are kept; say which is chosen, and why.

    Args:
        trained: the concept of the last step.
        scored: None for a training without scores, whose last step is the concept.
        params: of the training.
        tracker: its run is tagged with the step.
    """
    if scored is None:
        return trained, {}
    choice, metadata = scored.choice, trained.metadata
    level = logging.INFO if choice.is_within_bounds else logging.WARNING
    log.log(level, "Step %d of %d is the concept: %s.", choice.step, params.num_steps, choice.reason)
    tracker.set_tag("chosen_step", f"{choice.step}: {choice.reason}")
    kept = {step: Concept(tensors, metadata.model_copy(update={"step": step})) for step, tensors in scored.kept.items()}
    reason = choice.reason if params.choose == "best" else None
    of_concept = metadata.model_copy(update={"step": choice.step, "chosen": reason})
    return replace(trained, tensors=scored.kept[choice.step], metadata=of_concept), kept


def scores_table(scored: ScoredTraining | None) -> DataFrame:
    """Return the scores as a table; without any it has columns but no rows."""
    columns = [field.name for field in dataclasses.fields(Score)]
    return DataFrame(scored.rows) if scored else DataFrame(columns=[*columns, "within_bounds", "chosen"])
