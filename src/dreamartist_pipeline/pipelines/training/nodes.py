"""Check a training, and train a concept from one image."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from dreamartist_pipeline.core.devices import check_device
from dreamartist_pipeline.core.image_set import CaptionedImages
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.tracking import NoTracker, Tracker
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.params import DeviceParams, IngestionParams, TrainingParams
from dreamartist_pipeline.prompt_weights import parse_weights

if TYPE_CHECKING:
    from pandas import DataFrame

    from dreamartist_pipeline.core.concept import Concept
    from dreamartist_pipeline.core.starting import Start
    from dreamartist_pipeline.interop.user_files import UserFiles
    from dreamartist_pipeline.pipelines.training.resuming import Kept
else:  # Kedro evaluates a node's annotations when it registers the pipelines; these imports are slow
    Concept = DataFrame = Kept = Start = UserFiles = Any

log = logging.getLogger(__name__)
_ANY_DEVICE = DeviceParams()


def check_caption(params: TrainingParams, planned: PlannedConcept | None, caption: str) -> None:
    """Check the braces of the picture's caption; loading it has refused a text file that is no caption.

    Raises:
        InputError: unbalanced braces or an invalid weight.
    """
    parse_weights(caption)


@checked_early("device", check_device)
@checked_early("training", check_caption, "reference_caption")
def check_training(
    base_model: ModelLocation,
    params: TrainingParams,
    caption: str,
    device: DeviceParams = _ANY_DEVICE,
    start_files: UserFiles | None = None,
    ingestion: IngestionParams | None = None,
) -> dict[str, Any]:
    """Check a training against its base model, and decide how it fits into memory; weights are loaded on a GPU only.

    Returns:
        The plan: the caption, what of the prompts is cut off, branches, steps, rows and, per group, layers, parameters,
        vectors and effective learning rate; how steps are computed; with `start_from`, also the number of layers or
        vectors that each group takes over.

    Raises:
        InputError: an incomplete base model, a selector that matches no layer, a trigger word that is already a token,
            a template without its slot, a caption with a trigger word or with invalid braces, trigger words that are
            cut off, LoRA groups whose layers clip_skip skips, an optimizer that is not available, an invalid scheduler
            of the preview, a noise schedule that does not suit the base model, a start concept that does not fit the
            configured groups, an interrupted training with other settings, a GPU with too little memory, or a disk with
            too little space.
    """
    from dreamartist_pipeline.backbones.base_model import files_for
    from dreamartist_pipeline.pipelines.training.plan import make_plan
    from dreamartist_pipeline.pipelines.training.resuming import check_continues
    from dreamartist_pipeline.pipelines.training.starting import read_start

    start = read_start(start_files or {}, params)
    side_px = None if ingestion is None else ingestion.bucket.side_px
    plan = make_plan(files_for(base_model, device), params, caption, device, start, side_px)
    check_continues(base_model, params, caption, device, start)
    return plan


def compare_reconstruction(
    base_model: ModelLocation, prepared_image: Image, device: DeviceParams, tracker: Tracker
) -> Image:
    """Measure how well the base model's autoencoder reproduces the prepared image, and say what to expect.

    Returns:
        The image beside its reconstruction.

    Raises:
        InputError: the base model is incomplete.
    """
    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.pipelines.training.reconstruction import report_reconstruction

    return report_reconstruction(open_base_model(base_model, device), prepared_image, tracker)


@checked_early("device", check_device)
def train_concept(
    base_model: ModelLocation,
    prepared_image: Image,
    prepared_mask: Image,
    regularization_set: CaptionedImages,
    training_plan: dict[str, Any],
    params: TrainingParams,
    caption: str,
    device: DeviceParams,
    tracker: Tracker,
    start_files: UserFiles | None = None,
    prepared_framing: dict[str, tuple[int, int]] | None = None,
) -> tuple[Concept, DataFrame]:
    """Train both branches on the prepared image, from new values or from those of a concept, on all processes.

    `prepared_framing` is that of `prepare_reference`; None: the prepared image is a whole picture. An interrupted
    training is continued from `params.checkpoints`.

    Returns:
        The concept, and the history: one row per step.

    Raises:
        InputError: a plan for other parameters, another base model or another start concept, an interrupted training
            with another configuration, or too little memory.
        StoppedEarly: the training was stopped; its state is in `params.checkpoints`.
        TrainingError: a branch without gradient, or a training that diverges; its last good state is kept.
    """
    from dreamartist_pipeline.core.devices import pick_device
    from dreamartist_pipeline.core.processes import run_on_processes
    from dreamartist_pipeline.pipelines.training.ranks import num_training_processes
    from dreamartist_pipeline.pipelines.training.resuming import load_kept
    from dreamartist_pipeline.pipelines.training.starting import read_start

    num_processes = num_training_processes(params, device)
    if num_processes > 1:
        log.info("%d processes share the rows of each step.", num_processes)
    return run_on_processes(
        _train_on_rank,
        num_processes,
        *(base_model, prepared_image, prepared_mask, regularization_set, training_plan, params, caption, device),
        *(tracker, read_start(start_files or {}, params), prepared_framing, load_kept(params)),
        on_gpus=pick_device(device).type == "cuda",
    )


def _train_on_rank(
    base_model: ModelLocation,
    prepared_image: Image,
    prepared_mask: Image,
    regularization_set: CaptionedImages,
    training_plan: dict[str, Any],
    params: TrainingParams,
    caption: str,
    device: DeviceParams,
    tracker: Tracker,
    start: Start | None,
    prepared_framing: dict[str, tuple[int, int]] | None,
    kept: Kept | None,
) -> tuple[Concept, DataFrame]:
    """Train on one of the processes: they share the rows, and rank 0 alone draws previews and logs."""
    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept
    from dreamartist_pipeline.backbones.placement import off_device
    from dreamartist_pipeline.core.batches import derived_seed
    from dreamartist_pipeline.core.devices import device_of_rank
    from dreamartist_pipeline.core.images import Framing
    from dreamartist_pipeline.core.parameter_groups import parameter_groups
    from dreamartist_pipeline.core.processes import rank
    from dreamartist_pipeline.core.training import Alarms, Execution, fit, lr_factor
    from dreamartist_pipeline.pipelines.training.data import regularization_images, training_data
    from dreamartist_pipeline.pipelines.training.memory import memory_plan, out_of_memory_explained
    from dreamartist_pipeline.pipelines.training.plan import check_plan
    from dreamartist_pipeline.pipelines.training.reporting import (
        DivergenceReport,
        Previews,
        StepReport,
        history_table,
        log_performance,
    )
    from dreamartist_pipeline.pipelines.training.resuming import (
        checkpointing_of,
        concept_identity,
        pictures_identity,
        settings_identity,
    )
    from dreamartist_pipeline.pipelines.training.starting import apply_start
    from dreamartist_pipeline.pipelines.training.trainable import idle_modules, trainable_model

    is_first = rank() == 0
    tracker = tracker if is_first else NoTracker()
    images = regularization_images(regularization_set, params)
    identity = settings_identity(base_model, params, caption, device, start)
    identity |= pictures_identity(prepared_image, prepared_mask, prepared_framing, images)
    checkpointing = checkpointing_of(kept, identity, params, tracker) if kept else None
    backbone = open_base_model(base_model, device_of_rank(device, rank()))
    factor = lr_factor(params)
    new = start_concept(backbone, params, factor, derived_seed(params.seed, "initial"))
    start_entry = apply_start(start, new.stacks, new.words, params, backbone)
    groups = parameter_groups(new.stacks, new.words, params.words.lr * factor)
    check_plan(training_plan, groups, start_entry)
    metadata = concept_metadata(backbone, params, factor, start.sha256 if start else None)
    metadata = metadata.model_copy(update=concept_identity(identity))
    memory = memory_plan(training_plan, params)
    if memory.checkpointing:
        new.backbone.checkpoint_gradients()
    if params.backend == "compile":
        new.backbone.compile_denoiser()
    execution = Execution(memory.micro_batch, as_graph=params.backend == "cudagraph")
    model, idle = trainable_model(new, groups), idle_modules(new, params)
    framing = Framing.of_values(prepared_framing) if prepared_framing else None
    divergence = DivergenceReport([group.lr for group in groups], tracker)
    alarms = Alarms(divergence.halved, divergence.doubted)
    with out_of_memory_explained(backbone.device, memory), StepReport(params.num_steps, tracker) as report:
        data = training_data(backbone, new.prompts, prepared_image, prepared_mask, images, params, caption, framing)
        previews = Previews(new, params, tracker) if is_first else None
        if previews and checkpointing:
            checkpointing = previews.kept_in(checkpointing)
        with off_device(idle, backbone.device):
            history = fit(model, data, params, report, previews, None, execution, checkpointing, alarms)
    log_performance(history, backbone.device, tracker)
    return replace(new.snapshot(metadata), doubts=divergence.doubts), history_table(history)
