"""Check a training, and train a concept from one image."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from dreamartist_pipeline.core.devices import check_device
from dreamartist_pipeline.core.image_set import CaptionedImages
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.params import DeviceParams, IngestionParams, TrainingParams
from dreamartist_pipeline.prompt_weights import parse_weights

if TYPE_CHECKING:
    from pandas import DataFrame

    from dreamartist_pipeline.core.concept import Concept
    from dreamartist_pipeline.interop.user_files import UserFiles
else:  # Kedro evaluates a node's annotations when it registers the pipelines; these imports are slow
    Concept = DataFrame = UserFiles = Any

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
) -> tuple[Concept, DataFrame, DataFrame, dict[int, Concept]]:
    """Train both branches on the prepared image, from new values or from those of a concept, on all processes.

    `prepared_framing` is that of `prepare_reference`; None: the prepared image is a whole picture. An interrupted
    training is continued from `params.checkpoints`.

    Returns:
        The concept of the chosen step; the history, one row per step; the scores, one row per scored step; and step ->
        concept of the scored steps that are kept.

    Raises:
        InputError: a plan for other parameters, another base model or another start concept, an interrupted training
            with another configuration, or too little memory.
        StoppedEarly: the training was stopped; its state is in `params.checkpoints`.
        TrainingError: a branch without gradient, or a training that diverges; its last good state is kept.
    """
    from dreamartist_pipeline.core.devices import pick_device
    from dreamartist_pipeline.core.processes import run_on_processes
    from dreamartist_pipeline.pipelines.training.rank_training import Inputs, train_on_rank
    from dreamartist_pipeline.pipelines.training.ranks import num_training_processes
    from dreamartist_pipeline.pipelines.training.resuming import load_kept
    from dreamartist_pipeline.pipelines.training.starting import read_start

    num_processes = num_training_processes(params, device)
    if num_processes > 1:
        log.info("%d processes share the rows of each step.", num_processes)
    inputs = Inputs(
        base_model=base_model,
        params=params,
        device=device,
        caption=caption,
        prepared_image=prepared_image,
        prepared_mask=prepared_mask,
        framing=prepared_framing,
        regularization_set=regularization_set,
        start=read_start(start_files or {}, params),
        plan=training_plan,
        kept=load_kept(params),
        tracker=tracker,
    )
    return run_on_processes(train_on_rank, num_processes, inputs, on_gpus=pick_device(device).type == "cuda")
