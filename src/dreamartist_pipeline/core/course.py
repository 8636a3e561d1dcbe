"""The course of a training: the steps so far, checkpoints and interruptions, and the way back after a divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch

from dreamartist_pipeline.core.checkpoints import Checkpoint, Pauses, stop_requests
from dreamartist_pipeline.core.divergence import (
    MOST_HALVINGS,
    Divergence,
    GoodStates,
    Halving,
    LossBounds,
    StateBounds,
    are_finite,
    likely_causes,
)
from dreamartist_pipeline.core.history import History, HistoryRow
from dreamartist_pipeline.core.parameter_groups import WORDS
from dreamartist_pipeline.core.processes import num_ranks, on_any_rank, rank
from dreamartist_pipeline.core.training_step import Steps, TrainableModel
from dreamartist_pipeline.errors import STOPPED_BY_BUDGET, STOPPED_BY_SIGNAL, StoppedEarly, TrainingError

CHECKPOINT_ENTRIES = ("state", "history", "good_states", "halvings", "diverged_at")
"""What a checkpoint has; older versions of the project have saved fewer."""


@dataclass(frozen=True)
class StepRecord:
    """The values of one step.

    Attributes:
        step: counted from 1.
        loss: the total loss.
        parts: means over rows: `loss_reference`, `loss_regularization`, `loss_reconstruction` (before its weight) and
            `guidance_scale`, without the losses that this training does not have.
        lr: group -> learning rate.
        grad_norm: `<branch>/<kind>` -> gradient norm before clipping.
        seconds: duration of the step.
    """

    step: int
    loss: float
    parts: dict[str, float]
    lr: dict[str, float]
    grad_norm: dict[str, float]
    seconds: float

    @classmethod
    def of_row(cls, row: HistoryRow) -> StepRecord:
        """Return the record that `row` was made of."""
        by_kind: dict[str, dict[str, float]] = {"lr": {}, "grad_norm": {}, "": {}}
        for column, value in row.items():
            kind, slash, name = column.partition("/")
            by_kind[kind if slash else ""][name or column] = value
        parts = {name: value for name, value in by_kind[""].items() if name not in ("step", "loss", "seconds")}
        return cls(int(row["step"]), row["loss"], parts, by_kind["lr"], by_kind["grad_norm"], row["seconds"])

    def row(self) -> HistoryRow:
        """Return the record as one flat row, with keys `lr/<group>` and `grad_norm/<branch>/<kind>`."""
        return {
            "step": self.step,
            "loss": self.loss,
            **self.parts,
            **{f"lr/{name}": value for name, value in self.lr.items()},
            **{f"grad_norm/{name}": value for name, value in self.grad_norm.items()},
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Checkpointing:
    """How a training is saved and continued.

    Attributes:
        save: stores a checkpoint of `fit`, whose tensors change with the next step; called on rank 0 only.
        minutes: between two checkpoints; 0 for one after every step.
        max_minutes: from the first step on, after which the training stops; None for no limit.
        resumed: the checkpoint to continue from; None starts a new training.
        discard: removes all checkpoints; called on rank 0 only, if a training diverges before any good step.
    """

    save: Callable[[Checkpoint], None]
    minutes: float
    max_minutes: float | None = None
    resumed: Checkpoint | None = None
    discard: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Alarms:
    """What `fit` reports besides its steps; the functions are called on every rank.

    Attributes:
        on_halving: takes all halvings of the learning rates so far, after each of them, and when a training with some
            is continued.
        on_doubts: takes what makes the result doubtful, after the last step, if anything does.
    """

    on_halving: Callable[[Sequence[Halving]], None] = lambda halvings: None
    on_doubts: Callable[[Sequence[str]], None] = lambda doubts: None


# ------------------------------------------------------------------------------------------------- the steps so far


class Course:
    """The steps so far, whether they diverge, and the way back to a good state; one per rank.

    Attributes:
        history: one row per step.
        good: the good states.
        found: a divergence from which the training has not gone back yet; later steps are ignored.
    """

    def __init__(
        self,
        model: TrainableModel,
        steps: Steps,
        on_step: Callable[[StepRecord], None] | None,
        checkpointing: Checkpointing | None,
        alarms: Alarms,
    ) -> None:
        """Begin with the state of `steps`, or continue from the checkpoint."""
        self.history = History()
        self.good = GoodStates(steps.params.num_steps)
        self.found: Divergence | None = None
        self._model, self._steps, self._state, self._params = model, steps, steps.state, steps.params
        self._on_step, self._checkpointing, self._alarms = on_step, checkpointing, alarms
        self._check = _GradientCheck(model, self._params.num_steps)
        self._halvings: list[Halving] = []
        weight = self._params.loss.regularization_weight
        self._losses = LossBounds(steps.null_losses(), weight, skips=self._state.scaler.is_enabled())
        values = {group.name: flat for group, flat in zip(model.groups, self._state.parameters, strict=True)}
        self._values = StateBounds(values, [group.name for group in model.groups if group.kind == WORDS])
        if checkpointing and checkpointing.resumed:
            self._resume(checkpointing.resumed)
        else:
            self.good.keep(self._state.state_dict())

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self._state.step

    @property
    def num_steps(self) -> int:
        """The number of steps of the whole training."""
        return self._params.num_steps

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.step == self.num_steps

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._state.parameters[0].device

    @property
    def _halves(self) -> bool:
        return self._params.on_divergence == "halve_lr"

    @property
    def is_finite(self) -> bool:
        """Whether no divergence is known, and the parameters are finite; read from the device."""
        return self.found is None and all(are_finite(self._state.parameters))

    def add(self, records: Iterable[StepRecord]) -> None:
        """Add steps, up to the first that has diverged."""
        for record in records:
            if self.found:
                return
            self.history.append(record.row())
            self.found = self._losses.divergence(self.history)
            if not self.found:
                self._report(record)

    def settle(self, check_due: bool) -> bool:
        """Return whether the training goes on from here; otherwise it has gone back to a good state.

        Args:
            check_due: whether the parameters are checked, and kept as a good state.

        Raises:
            TrainingError: the training has diverged and stops.
        """
        if check_due and not self.found:
            averages = self._state.averages.values if self._state.averages else ()
            self.found = self._values.divergence(self.step, averages)
        if self.found:
            self._recover(self.found)
            return False
        if check_due and not self.is_done:  # at the end, a copy would only take memory
            self.good.keep(self._state.state_dict())
        return True

    def go_back(self) -> None:
        """Go back to the newest good state; the steps after it are taken again."""
        state = self.good.states[-1]
        self._state.load_state_dict(state)
        self.history.cut(state["step"])
        self.found = None

    def checkpoint(self, diverged_at: int | None = None) -> Checkpoint:
        """Return everything from which the training continues, to be saved before the next step.

        `diverged_at` marks a training that stops by a divergence.

        Without halve_lr, the older good state is enough: no result depends on it, and each is as large as the state.
        """
        return {
            "state": self._state.to_save(),
            "history": self.history.to_save(),
            "good_states": self.good.states if self._halves else self.good.states[:1],
            "halvings": [[halving.diverged_at, halving.back_to] for halving in self._halvings],
            "diverged_at": diverged_at,
        }

    def doubts(self) -> list[str]:
        """Return what makes the result doubtful, after the last step."""
        if not self.history:
            return []
        steps = ", ".join(str(halving.diverged_at) for halving in self._halvings)
        diverged = [f"the training diverged (step {steps}) before its rates were halved"] if steps else []
        return [*diverged, *self._losses.doubts(self.history), *self._values.doubts()]

    def _resume(self, checkpoint: Checkpoint) -> None:
        self._state.load_state_dict(checkpoint["state"])
        self.good.states = checkpoint["good_states"]
        self._set_halvings([Halving(*steps) for steps in checkpoint["halvings"]])
        self.history = History.of_saved(checkpoint["history"])
        for row in self.history:
            self._report(StepRecord.of_row(row))

    def _report(self, record: StepRecord) -> None:
        self._check(record)
        if self._on_step:
            self._on_step(record)

    def _recover(self, found: Divergence) -> None:
        """Go back, and halve the learning rates or stop; the loss of the first step does not depend on them."""
        self.good.forget_from(found.step)
        self.go_back()
        if not self._halves or found.step == 1 or len(self._halvings) == MOST_HALVINGS:
            self._stop(found)
        self._set_halvings([*self._halvings, Halving(found.step, self.step)])

    def _set_halvings(self, halvings: list[Halving]) -> None:
        self._halvings, self._steps.lr_factor = halvings, 0.5 ** len(halvings)
        if halvings:
            self._alarms.on_halving(halvings)

    def _stop(self, found: Divergence) -> NoReturn:
        """Keep the good state, and raise the error."""
        if self._checkpointing and rank() == 0:
            if self.step:
                self._checkpointing.save(self.checkpoint(found.step))
            else:
                self._checkpointing.discard()
        rates = {group.name: self._steps.lr_factor * group.lr for group in self._model.groups}
        causes = likely_causes(found, rates, str(self._params.guidance_scale), self._model.dtype)
        dtype = str(self._model.dtype).removeprefix("torch.")
        raise TrainingError(
            expected=found.expected,
            got=f"{found.got} after step {found.step} of {self._params.num_steps} (base model in {dtype})",
            remedy=f"likely causes: {causes}. {self._ways_on()}",
        )

    def _ways_on(self) -> str:
        """Return what is kept of a diverged training, and how to go on."""
        if not (self._checkpointing and self.step):
            return "No step is kept: the corrected command starts anew"
        halve = "" if self._halvings else ", with training.on_divergence=halve_lr"
        return (
            f"The last good state, of step {self.step}, is kept. The same command would diverge again: continue with "
            f"lower rates and training.resume=force{halve}, or start anew with training.resume=never"
        )


class _GradientCheck:
    """Checks once that adapters and words of every branch received a gradient."""

    def __init__(self, model: TrainableModel, num_steps: int) -> None:
        self._has_one_branch, self._num_steps, self._is_done = model.num_branches == 1, num_steps, False

    def __call__(self, record: StepRecord) -> None:
        """Check the first step in which the negative branch, if any, gets a gradient, or the last.

        Rows with a guidance scale of exactly 1 give it none.

        Raises:
            TrainingError: adapters or words without a gradient.
        """
        trains_all = self._has_one_branch or record.parts["guidance_scale"] != 1
        if self._is_done or not (trains_all or record.step == self._num_steps):
            return
        for name, norm in record.grad_norm.items():
            if norm == 0:
                raise TrainingError(
                    expected=f"a nonzero gradient of {name} in the first step",
                    got="0",
                    remedy="check that every template has a slot and that the base model is trained",
                )
        self._is_done = True


# ------------------------------------------------------------------------------------------------- interruptions


class Interruption:
    """Saves checkpoints between two steps, and stops the training; one per rank."""

    def __init__(self, save: Callable[[Checkpoint], None], pauses: Pauses, course: Course) -> None:
        """Neither save nor stop yet.

        Args:
            save: of `Checkpointing`.
            pauses: tells when.
            course: of the training.
        """
        self._save, self._pauses, self._course = save, pauses, course
        self.stops = False

    def is_due(self, can_wait: bool) -> bool:
        """Return whether `take` has to be called after this step, once its loss has been read.

        All ranks call this after the same steps, and stop after the same one.

        Args:
            can_wait: whether the ranks may agree on a stop after a later step; on a GPU, they wait for the device.
        """
        device = self._course.device
        if num_ranks() == 1 or not (can_wait and device.type == "cuda"):
            self.stops = on_any_rank(self._pauses.stops(), device)
        return self.stops or (rank() == 0 and (self._course.is_done or self._pauses.checkpoint_is_due()))

    def take(self) -> None:
        """Save a checkpoint, and stop the training by a signal, or if its minutes are over and a step is left.

        Parameters that are not finite are not saved: the next step shows that the training diverges. If it stops
        before, the newest good state is saved.

        Raises:
            StoppedEarly: the training stops.
        """
        course = self._course
        is_finite = course.is_finite
        if self.stops and not is_finite:
            course.go_back()
        with self._pauses.saving():
            if rank() == 0 and (self.stops or is_finite):
                self._save(course.checkpoint())
        if self.stops and not (self._pauses.is_over and course.is_done):
            self.stop()

    def stop(self) -> NoReturn:
        """Stop the training, whose last step is saved.

        Raises:
            StoppedEarly: always.
        """
        is_over = self._pauses.is_over
        raise StoppedEarly(
            ("training.max_minutes is over. " if is_over else "")
            + f"The training stops after step {self._course.step} of {self._course.num_steps}, which is kept; the same "
            "command continues.",
            STOPPED_BY_BUDGET if is_over else STOPPED_BY_SIGNAL,
        )


@contextmanager
def interruptible(checkpointing: Checkpointing | None, course: Course) -> Iterator[Interruption | None]:
    """Yield what saves and stops a training, for which SIGINT and SIGTERM wait for the end of a step."""
    if checkpointing is None:
        yield None
        return
    with stop_requests() as stop_requested:
        max_minutes = checkpointing.max_minutes if rank() == 0 else None  # one clock decides
        pauses = Pauses(stop_requested, checkpointing.minutes, max_minutes)
        interruption = Interruption(checkpointing.save, pauses, course)
        yield interruption
        if stop_requested():  # after the last step
            interruption.stop()
