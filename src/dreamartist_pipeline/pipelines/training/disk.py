"""The space on the disk that a training needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamartist_pipeline.core.choosing import most_kept, scored_steps
from dreamartist_pipeline.disk_space import PNG_PIXEL_BYTES, check_free_space
from dreamartist_pipeline.params import TrainingParams

_VALUE_BYTES = 4  # float32
_STATE_VALUES = 3  # per trained value in a checkpoint: itself, and two moments of the optimizer
_NUM_CHECKPOINTS = 3  # the last two, and the one that is being written
_NUM_COPIES = 6  # of the concept: the old and the new one, the tracking store's, and an export in several formats
_NUM_KEPT = 2  # folders of kept steps: the old and the new one; each checkpoint has them, too
_STEP_BYTES = 1000  # a row of the history, in the checkpoints and as text


def check_disk(plan: Mapping[str, Any], params: TrainingParams, side_px: int) -> None:
    """Check that checkpoints, concept, previews and export will fit on the disk; nothing without checkpoints.

    Args:
        plan: from `make_plan`.
        params: of the training.
        side_px: of a preview.

    Raises:
        InputError: the disk has less free space.
    """
    if params.checkpoints is not None:
        what = f"the training of {sum(group['num_parameters'] for group in plan['groups']):,} parameters"
        fewer = "lower the ranks, training.num_steps or the number of previews (training.preview.every)"
        check_free_space(Path(params.checkpoints), needed_bytes(plan, params, side_px), what, fewer)


def needed_bytes(plan: Mapping[str, Any], params: TrainingParams, side_px: int) -> int:
    """Return an estimate of the bytes; arguments are those of `check_disk`."""
    concept: int = _VALUE_BYTES * sum(group["num_parameters"] for group in plan["groups"])
    num_states = 2 + (params.on_divergence == "halve_lr")  # the state itself, and good ones
    state = num_states * concept * (_STATE_VALUES + (params.ema_decay > 0)) + _STEP_BYTES * params.num_steps
    num_previews = params.num_steps // params.preview.every + 1 if params.preview.every else 0
    previews = num_previews * len(params.preview.prompts) * PNG_PIXEL_BYTES * side_px**2
    kept = concept * min(len(scored_steps(params)), most_kept(concept))
    return _NUM_CHECKPOINTS * (state + kept) + _NUM_COPIES * concept + _NUM_KEPT * kept + previews
