"""Train a concept on one of the processes that share the rows of each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pandas import DataFrame
from PIL.Image import Image

from dreamartist_pipeline.backbones.base_model import open_base_model
from dreamartist_pipeline.backbones.concepts import NewConcept, concept_metadata, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.placement import off_device
from dreamartist_pipeline.core.batches import derived_seed
from dreamartist_pipeline.core.choosing import scored_steps
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.course import Alarms, Checkpointing
from dreamartist_pipeline.core.devices import device_of_rank
from dreamartist_pipeline.core.history import History
from dreamartist_pipeline.core.image_set import CaptionedImages
from dreamartist_pipeline.core.images import Framing
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.parameter_groups import ParameterGroup, parameter_groups
from dreamartist_pipeline.core.processes import rank
from dreamartist_pipeline.core.starting import Start
from dreamartist_pipeline.core.tracking import NoTracker, Tracker
from dreamartist_pipeline.core.training import Scoring, fit
from dreamartist_pipeline.core.training_step import Execution, lr_factor
from dreamartist_pipeline.core.validation import Validation
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.pipelines.training.data import regularization_images, training_data
from dreamartist_pipeline.pipelines.training.memory import MemoryPlan, memory_plan, out_of_memory_explained
from dreamartist_pipeline.pipelines.training.plan import check_plan
from dreamartist_pipeline.pipelines.training.reporting import (
    DivergenceReport,
    Previews,
    StepReport,
    history_table,
    log_performance,
    log_scoring_time,
)
from dreamartist_pipeline.pipelines.training.resuming import (
    Kept,
    checkpointing_of,
    concept_identity,
    pictures_identity,
    settings_identity,
)
from dreamartist_pipeline.pipelines.training.scoring import Scorer, chosen_concept, make_scorer, scores_table
from dreamartist_pipeline.pipelines.training.starting import apply_start
from dreamartist_pipeline.pipelines.training.trainable import idle_modules, trainable_model


@dataclass(frozen=True)
class Inputs:
    """Everything that determines a training, equal on all processes, and where it is kept and logged.

    Attributes:
        base_model: where it is.
        params: of the training.
        device: of each process.
        caption: of the picture.
        prepared_image: RGB.
        prepared_mask: L, of the same size.
        framing: which part of the picture the image is; None for the whole.
        regularization_set: captioned images.
        start: the concept whose values the training starts from, or None.
        plan: of `check_training`.
        kept: the checkpoints, or None without any.
        tracker: used by rank 0 alone.
    """

    base_model: ModelLocation
    params: TrainingParams
    device: DeviceParams
    caption: str
    prepared_image: Image
    prepared_mask: Image
    framing: Mapping[str, tuple[int, int]] | None
    regularization_set: CaptionedImages
    start: Start | None
    plan: dict[str, Any]
    kept: Kept | None
    tracker: Tracker


def train_on_rank(inputs: Inputs) -> tuple[Concept, DataFrame, DataFrame, dict[int, Concept]]:
    """Train on this process; rank 0 alone draws previews, scores, chooses, logs and saves.

    Returns:
        The results of `train_concept`; on other ranks, the concept of the last step.

    Raises:
        InputError, StoppedEarly, TrainingError: see `train_concept`.
    """
    params = inputs.params
    tracker = inputs.tracker if rank() == 0 else NoTracker()
    images = regularization_images(inputs.regularization_set, params)
    identity = _identity(inputs, images)
    checkpointing = checkpointing_of(inputs.kept, identity, params, tracker) if inputs.kept else None
    backbone = open_base_model(inputs.base_model, device_of_rank(inputs.device, rank()))
    new, groups = _new_concept(inputs, backbone)
    divergence = DivergenceReport([group.lr for group in groups], tracker)
    alarms = Alarms(divergence.halved, divergence.doubted)
    history, scorer = _fit(inputs, images, backbone, new, groups, checkpointing, alarms, tracker)
    log_performance(history, backbone.device, tracker)
    metadata = concept_metadata(backbone, params, lr_factor(params), inputs.start.sha256 if inputs.start else None)
    metadata = metadata.model_copy(update=concept_identity(identity))
    trained = replace(new.snapshot(metadata), doubts=divergence.doubts)
    if scorer:
        log_scoring_time(scorer.seconds, history, tracker)
    scored = scorer.result() if scorer else None
    concept, kept = chosen_concept(trained, scored, params, tracker)
    return concept, history_table(history), scores_table(scored), kept


def _identity(inputs: Inputs, images: list[tuple[str, Image]]) -> dict[str, Any]:
    settings = settings_identity(inputs.base_model, inputs.params, inputs.caption, inputs.device, inputs.start)
    return settings | pictures_identity(inputs.prepared_image, inputs.prepared_mask, inputs.framing, images)


def _new_concept(inputs: Inputs, backbone: Backbone) -> tuple[NewConcept, tuple[ParameterGroup, ...]]:
    """Return the adapters and words before the first step, and their groups, after comparing them with the plan."""
    params = inputs.params
    factor = lr_factor(params)
    new = start_concept(backbone, params, factor, derived_seed(params.seed, "initial"))
    start_entry = apply_start(inputs.start, new.stacks, new.words, params, backbone)
    groups = parameter_groups(new.stacks, new.words, params.words.lr * factor)
    check_plan(inputs.plan, groups, start_entry)
    return new, groups


def _execution(new: NewConcept, memory: MemoryPlan, params: TrainingParams) -> Execution:
    """Prepare the networks for the way in which steps are computed, and return it."""
    if memory.checkpointing:
        new.backbone.checkpoint_gradients()
    if params.backend == "compile":
        new.backbone.compile_denoiser()
    return Execution(memory.micro_batch, as_graph=params.backend == "cudagraph")


def _fit(
    inputs: Inputs,
    images: list[tuple[str, Image]],
    backbone: Backbone,
    new: NewConcept,
    groups: tuple[ParameterGroup, ...],
    checkpointing: Checkpointing | None,
    alarms: Alarms,
    tracker: Tracker,
) -> tuple[History, Scorer | None]:
    """Train the new concept in place, and return its history, and on rank 0 what has scored it, if it was scored."""
    params, device = inputs.params, new.backbone.device
    memory = memory_plan(inputs.plan, params)
    execution = _execution(new, memory, params)
    model = trainable_model(new, groups)
    framing = Framing.of_values(inputs.framing) if inputs.framing else None
    with out_of_memory_explained(device, memory), StepReport(params.num_steps, tracker) as report:
        data = training_data(
            *(new.backbone, new.prompts, inputs.prepared_image, inputs.prepared_mask, images),
            *(params, inputs.caption, framing),
        )
        previews = Previews(new, params, tracker) if rank() == 0 else None
        steps, scorer = scored_steps(params), None
        if steps and rank() == 0:
            validation = Validation(model, data, params, memory.micro_batch)
            scorer = make_scorer(new, backbone, inputs.base_model, inputs.prepared_image, params, validation, tracker)
        for drawing in (previews, scorer):
            if drawing and checkpointing:
                checkpointing = drawing.kept_in(checkpointing)
        scoring = Scoring(steps, scorer, scorer.is_over) if scorer else Scoring(steps)
        with off_device(idle_modules(new, params), device):
            history = fit(model, data, params, report, previews, None, execution, checkpointing, alarms, scoring)
    return history, scorer
