"""Train a concept: the loop around the step of `training_step`, with the checks and reports of `course`.

Several processes share the rows of a step: each draws the whole batch, computes its rows, and gets the sums of losses
and gradients over all processes, so that all take the same optimizer step.

A step does not wait for the device: `batches` uploads what is drawn for many steps at once, and losses are read for
several steps at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from dreamartist_pipeline.core.batches import TrainingData
from dreamartist_pipeline.core.course import (
    Alarms,
    Checkpointing,
    Course,
    Interruption,
    StepRecord,
    interruptible,
)
from dreamartist_pipeline.core.history import History
from dreamartist_pipeline.core.processes import num_ranks, on_any_rank
from dreamartist_pipeline.core.trainer import FinishedStep, TrainingState, train
from dreamartist_pipeline.core.training_step import Execution, Steps, TrainableModel, training_state
from dreamartist_pipeline.params import TrainingParams

_READ_AFTER_S = 0.5  # losses of slow steps are read earlier than every `Execution.read_every` steps
_IN_ONE_PASS, _NO_ALARMS = Execution(), Alarms()


@dataclass(frozen=True)
class Scoring:
    """How a training is scored between two steps.

    Attributes:
        steps: after which it is scored, if its parameters are finite; the same on all ranks.
        score: takes the number of finished steps, and returns whether the training is to stop; called on every rank.
        is_over: whether scores before the resumed checkpoint have stopped the training.
    """

    steps: Collection[int]
    score: Callable[[int], bool] = lambda step: False
    is_over: bool = False


_NO_SCORING = Scoring(())


def fit(
    model: TrainableModel,
    data: TrainingData,
    params: TrainingParams,
    on_step: Callable[[StepRecord], None] | None = None,
    on_preview: Callable[[int], None] | None = None,
    state: TrainingState | None = None,
    execution: Execution = _IN_ONE_PASS,
    checkpointing: Checkpointing | None = None,
    alarms: Alarms = _NO_ALARMS,
    scoring: Scoring = _NO_SCORING,
) -> History:
    """Train the model's parameters in place and return one history row per step.

    With averages (`ema_decay`, schedule_free), the parameters hold the averages during `on_preview`, `scoring.score`
    and at the end.

    Args:
        model: base model, adapters and words.
        data: images as latents, and prompts as tokens.
        params: of the training.
        on_step: called once per step, in order, for several steps at a time, after their losses are read. With
            `params.on_divergence` halve_lr, steps are repeated from that after a good state.
        on_preview: called with the number of finished steps: with 0 before the first step, every
            `params.preview.every` steps, and after the last; never if that is 0.
        state: from `training_state`, possibly loaded; None starts a new training.
        execution: how steps are computed.
        checkpointing: None saves nothing, and leaves SIGINT and SIGTERM alone. A training that continues from a
            checkpoint first calls `on_step` for the steps before it, and returns the history of all steps.
        alarms: called for halved rates and a doubtful result.
        scoring: may stop the training before its last step.

    Raises:
        TrainingError: a branch receives no gradient in the first step, or the training diverges (`divergence`); raised
            when the losses are read, up to `execution.read_every` steps later. The last good state is in the
            checkpoint.
        StoppedEarly: SIGINT, SIGTERM or `max_minutes` stopped the training, after the same step on all ranks; its last
            step is in the checkpoint.
        InputError: a checkpoint whose parameters or optimizers differ.

    Within a process group, every rank calls this with equal arguments, save the callbacks.
    """
    state = state or training_state(model, params)
    steps = Steps(model, data, params, state, execution)
    course = Course(model, steps, on_step, checkpointing, alarms)
    with interruptible(checkpointing, course) as interruption:
        _run(steps, course, on_preview, interruption, scoring)
    if doubts := course.doubts():
        alarms.on_doubts(doubts)
    state.keep_averages()
    return course.history


_OnDevice = tuple[FinishedStep[dict[str, torch.Tensor]], dict[str, float | torch.Tensor], dict[str, torch.Tensor]]
"""A finished step, its learning rates, and its gradient norms."""


def _run(
    steps: Steps,
    course: Course,
    on_preview: Callable[[int], None] | None,
    interruption: Interruption | None,
    scoring: Scoring,
) -> None:
    """Run all steps, and between two of them what is due: reading, checks, previews, scores, checkpoints.

    Ranks may read losses at different times, but go back to a good state after the same step.
    """
    params, state = steps.params, steps.state
    pending: list[_OnDevice] = []
    if scoring.steps and on_any_rank(scoring.is_over, course.device):
        return
    if on_preview and params.preview.every and state.step == 0:
        on_preview(0)
    if interruption and not course.is_done and interruption.is_due(can_wait=False):
        interruption.take()
    started = time.perf_counter()
    for done in train(
        state, params.num_steps, set_rates=steps.set_rates, gradients_of=steps.gradients, clip=steps.clip
    ):
        pending.append((done, steps.rates, steps.grad_norms))
        preview_due = bool(params.preview.every) and (done.step % params.preview.every == 0 or course.is_done)
        check_due = course.good.is_due(done.step) or course.is_done
        scoring_due = done.step in scoring.steps
        all_read = preview_due or scoring_due or check_due or done.step % steps.execution.read_every == 0
        pause_due = interruption is not None and interruption.is_due(can_wait=not all_read)
        is_slow = time.perf_counter() - started > _READ_AFTER_S
        if not (all_read or pause_due or is_slow):
            continue
        course.add(_read(pending, started))
        pending.clear()
        all_read = all_read or num_ranks() == 1 or (interruption is not None and interruption.stops)
        is_good = course.settle(check_due) if all_read else True
        if is_good and preview_due and on_preview:
            with state.averaged():
                on_preview(done.step)
        is_over = is_good and scoring_due and course.is_finite and _is_over_by(scoring, state, course.device)
        if interruption and (pause_due or is_over):
            interruption.take()
        if is_over:
            return
        started = time.perf_counter()


def _is_over_by(scoring: Scoring, state: TrainingState, device: torch.device) -> bool:
    """Score the current state, and return whether the training stops on all ranks."""
    with state.averaged():
        return on_any_rank(scoring.score(state.step), device)


def _read(pending: Sequence[_OnDevice], started: float) -> Iterator[StepRecord]:
    """Read finished steps from the device in one transfer."""
    stacked = []
    for done, rates, norms in pending:
        estimated = [rate for rate in rates.values() if isinstance(rate, torch.Tensor)]
        stacked.append(torch.stack([done.loss, *done.parts.values(), *norms.values(), *estimated]))
    values = torch.stack(stacked).tolist()
    seconds = (time.perf_counter() - started) / len(pending)
    for (done, rates, norms), (loss, *others) in zip(pending, values, strict=True):
        remaining = iter(others)
        parts = {name: next(remaining) for name in done.parts}
        grad_norm = {name: next(remaining) for name in norms}
        lr = {name: next(remaining) if isinstance(rate, torch.Tensor) else rate for name, rate in rates.items()}
        yield StepRecord(done.step, loss, parts, lr, grad_norm, seconds)
