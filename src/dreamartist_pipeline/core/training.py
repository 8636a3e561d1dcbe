"""Train a concept: one step of DreamArtist++, and the loop around it.

A step draws rows of the reference image and of the regularization set, predicts for both branches in one pass of 2·B
rows, combines the predictions as in classifier-free guidance, and takes the loss of the combination. The base model is
passed in as two callables, so this module is independent of diffusers.

Several processes share the rows of a step: each draws the whole batch, computes its rows, and gets the sums of losses
and gradients over all processes, so that all take the same optimizer step.

A step does not wait for the device: `batches` uploads what is drawn for many steps at once, and losses are read for
several steps at a time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from dreamartist_pipeline.core.adapters import AdapterStack
from dreamartist_pipeline.core.batches import Batch, BatchSource, TrainingData, step_generator
from dreamartist_pipeline.core.branches import combine, guidance_at, repeat, rows_of
from dreamartist_pipeline.core.checkpoints import Checkpoint, Pauses, stop_requests
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.divergence import (
    MOST_HALVINGS,
    WINDOW,
    Divergence,
    GoodStates,
    Halving,
    LossBounds,
    StateBounds,
    are_finite,
    likely_causes,
)
from dreamartist_pipeline.core.losses import image_error, masked_huber, masked_mse
from dreamartist_pipeline.core.optimizers import flatten, make_optimizers, rate_of
from dreamartist_pipeline.core.parameter_groups import WORDS, ParameterGroup
from dreamartist_pipeline.core.processes import num_ranks, on_any_rank, rank, rows_of_rank, sum_over_ranks
from dreamartist_pipeline.core.prompt_tokens import (
    Conditioning,
    PromptTokens,
    detached_leaves,
    map_tensors,
)
from dreamartist_pipeline.core.schedules import schedule_factor, scheduled_beta1
from dreamartist_pipeline.core.step_graph import GraphedPasses, Passes
from dreamartist_pipeline.core.trainer import Averages, Backward, FinishedStep, TrainingState, normalized_ema, train
from dreamartist_pipeline.errors import STOPPED_BY_BUDGET, STOPPED_BY_SIGNAL, StoppedEarly, TrainingError
from dreamartist_pipeline.params import LossParams, TrainingParams

CHECKPOINT_ENTRIES = ("state", "history", "good_states", "halvings", "diverged_at")
"""What a checkpoint has; older versions of the project have saved fewer."""
_PROMPTS_AT_ONCE = 16  # rows of one call of the text encoder, where all prompts are encoded before the first step
_READ_AFTER_S = 0.5  # losses of slow steps are read earlier than every `Execution.read_every` steps

HistoryRow = dict[str, float]


# ------------------------------------------------------------------------------------------------- model and data


@dataclass(frozen=True)
class TrainableModel:
    """The base model with adapters and words, as the training loop uses it.

    Attributes:
        denoise: (noisy latents `[nb·B, C, h, w]`, timesteps `[nb·B]`, conditioning of nb·B rows, framing of nb·B rows)
            -> prediction.
        encode: tokens `[nb·P, L]`, branches stacked -> conditioning of nb·P rows.
        objective: noising, target and loss weight of the base model.
        groups: all trainable parameters.
        num_branches: nb, 2 (negative, positive) or 1 (positive only).
        dtype: of the base model; with float16, the loss is scaled.
        decode: latents `[B, C, h, w]` -> images `[B, 3, H, W]`, differentiable; needed for the reconstruction loss.
        latent_adapters: adapters used in `denoise`; their dropout masks are drawn before every step.
        prompt_adapters: the same for `encode`.
        has_constant_prompts: whether nothing trained takes part in `encode`; all prompts are then encoded once.
    """

    denoise: Callable[[torch.Tensor, torch.Tensor, Conditioning, torch.Tensor | None], torch.Tensor]
    encode: Callable[[PromptTokens], Conditioning]
    objective: Objective
    groups: tuple[ParameterGroup, ...]
    num_branches: int
    dtype: torch.dtype = torch.float32
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    latent_adapters: tuple[AdapterStack, ...] = ()
    prompt_adapters: tuple[AdapterStack, ...] = ()
    has_constant_prompts: bool = False


@dataclass(frozen=True)
class Execution:
    """How steps are computed; the gradients are those of the plain step, up to rounding.

    Attributes:
        micro_batch: rows of one forward and backward pass, in each branch; None for all rows of a step and process.
        as_graph: whether the passes of a step are a CUDA graph, see `step_graph`.
        read_every: number of steps between reads of losses and gradient norms from the device. Slow steps are read
            more often.
    """

    micro_batch: int | None = None
    as_graph: bool = False
    read_every: int = 10


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


# ------------------------------------------------------------------------------------------------- one step


def encode_prompts(model: TrainableModel, tokens: PromptTokens) -> Conditioning:
    """Return the conditioning of nb·P rows for tokens `[P, nb, L]`."""
    return model.encode(tokens.branches_in_rows())


def combined_prediction(
    model: TrainableModel, batch: Batch, guidance: torch.Tensor, conditioning: Conditioning | None = None
) -> torch.Tensor:
    """Return ε̂ = ε_neg + s · (ε_pos − ε_neg) of every row, float32 `[B, C, h, w]`.

    Args:
        model: the base model with adapters and words.
        batch: of a step, or a part of its rows.
        guidance: s, `[B]`.
        conditioning: from `encode_prompts(model, batch.tokens)`; None computes it.
    """
    branches = model.num_branches
    if conditioning is None:
        conditioning = encode_prompts(model, batch.tokens)
    of_rows = conditioning[rows_of(batch.prompt_of_row, len(batch.tokens), branches)]  # nb·B rows
    noisy_latents = model.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    framing = None if batch.framing is None else repeat(batch.framing, branches)
    prediction = model.denoise(repeat(noisy_latents, branches), repeat(batch.timesteps, branches), of_rows, framing)
    return combine(prediction.float(), guidance, branches)


@contextmanager
def packed_factors(model: TrainableModel) -> Iterator[None]:
    """Pack the factors of all adapters once for the passes within this context."""
    with ExitStack() as packed:
        for adapters in (*model.latent_adapters, *model.prompt_adapters):
            packed.enter_context(adapters.packed())
        yield


def row_losses(prediction: torch.Tensor, batch: Batch, objective: Objective, loss: LossParams) -> torch.Tensor:
    """Return mean(w(t) · mask · (ε̂ − target)²) of each row, float32 `[B]`, or the same with the Huber loss."""
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    weight = objective.loss_weight(loss.weighting, loss.snr_gamma, batch.timesteps)
    if loss.kind == "huber":
        return masked_huber(prediction, target, weight, batch.mask, loss.huber_delta)
    return masked_mse(prediction, target, weight, batch.mask)


def reconstruction_loss(
    model: TrainableModel, prediction: torch.Tensor, batch: Batch, pixels: torch.Tensor | None, norm: str
) -> torch.Tensor:
    """Return mean(mask · |D(ẑ₀) − x|) over the reference rows, or the mean of squares: a scalar.

    ẑ₀ are the clean latents that follow from the combined prediction, D is the frozen decoder, and x the reference
    image (the reconstruction constraint of Dong et al. 2022). There is no SNR weighting.

    Args:
        model: with `decode`.
        prediction: of the reference rows, `[R, C, h, w]`; these are the first R rows of the batch.
        batch: of the step.
        pixels: x, `[1, 3, H, W]` in [-1, 1].
        norm: "l1" or "l2".

    Raises:
        ValueError: `model.decode` or `pixels` is None.
    """
    if model.decode is None or pixels is None:
        raise ValueError("the reconstruction loss needs TrainableModel.decode and TrainingData.pixels, got None")
    rows, objective = slice(len(prediction)), model.objective
    timesteps = batch.timesteps[rows]
    noisy_latents = objective.add_noise(batch.latents[rows], batch.noise[rows], timesteps)
    decoded = model.decode(objective.predicted_latents(noisy_latents, prediction, timesteps))
    mask = None if batch.mask is None else batch.mask[rows]
    return image_error(decoded, pixels.expand_as(decoded), mask, norm).mean()


def lr_factor(params: TrainingParams) -> int:
    """Return the factor on every learning rate: the total batch size with `scale_lr`, otherwise 1."""
    return params.batch_size + params.regularization_batch_size if params.scale_lr else 1


# ------------------------------------------------------------------------------------------------- the loop


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


def training_state(model: TrainableModel, params: TrainingParams) -> TrainingState:
    """Return the state before the first step: one flat parameter per group, of which the model's become views.

    Steps that the gradient scaler skips are left out of the averages (`ema_decay`), but count for the learning-rate
    schedules, which end with the training.
    """
    parameters = [flatten(group.parameters) for group in model.groups]
    flats = {group.name: parameter for group, parameter in zip(model.groups, parameters, strict=True)}
    for adapters in (*model.latent_adapters, *model.prompt_adapters):
        adapters.use_flat(flats)
    by_optimizer: dict[str, list[dict[str, Any]]] = {}
    for group, parameter in zip(model.groups, parameters, strict=True):
        settings = params.words if group.kind == WORDS else params
        torch_group = {"params": [parameter], "lr": group.lr, "weight_decay": settings.weight_decay}
        by_optimizer.setdefault(settings.optimizer, []).append(torch_group)
    return TrainingState(
        parameters,
        [optimizer for name, groups in by_optimizer.items() for optimizer in make_optimizers(name, groups)],
        Averages(parameters, normalized_ema(params.ema_decay)) if params.ema_decay else None,
        torch.amp.GradScaler(parameters[0].device.type, enabled=model.dtype == torch.float16),
    )


def fit(
    model: TrainableModel,
    data: TrainingData,
    params: TrainingParams,
    on_step: Callable[[StepRecord], None] | None = None,
    on_preview: Callable[[int], None] | None = None,
    state: TrainingState | None = None,
    execution: Execution = Execution(),
    checkpointing: Checkpointing | None = None,
    alarms: Alarms = Alarms(),
) -> list[HistoryRow]:
    """Train the model's parameters in place and return one history row per step.

    With averages (`ema_decay`, schedule_free), the parameters hold the averages during `on_preview` and at the end.

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
    steps = _Steps(model, data, params, state, execution)
    course = _Course(model, steps, on_step, checkpointing, alarms)
    with _interruptible(checkpointing, course) as interruption:
        _run(steps, course, on_preview, interruption)
    if doubts := course.doubts():
        alarms.on_doubts(doubts)
    state.keep_averages()
    return course.history


class _Course:
    """The steps so far, whether they diverge, and the way back to a good state; one per rank.

    Attributes:
        history: one row per step.
        good: the good states.
        found: a divergence from which the training has not gone back yet; later steps are ignored.
    """

    def __init__(
        self,
        model: TrainableModel,
        steps: _Steps,
        on_step: Callable[[StepRecord], None] | None,
        checkpointing: Checkpointing | None,
        alarms: Alarms,
    ) -> None:
        """Begin with the state of `steps`, or continue from the checkpoint."""
        self.history: list[HistoryRow] = []
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
        if check_due:
            self.good.keep(self._state.state_dict())
        return True

    def go_back(self) -> None:
        """Go back to the newest good state; the steps after it are taken again."""
        state = self.good.states[-1]
        self._state.load_state_dict(state)
        self.history[:] = [row for row in self.history if row["step"] <= state["step"]]
        self.found = None

    def checkpoint(self, diverged_at: int | None = None) -> Checkpoint:
        """Return everything from which the training continues, to be saved before the next step.

        `diverged_at` marks a training that stops by a divergence.

        Without halve_lr, the older good state is enough: no result depends on it, and each is as large as the state.
        """
        return {
            "state": self._state.to_save(),
            "history": _packed(self.history),
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
        self.history = _unpacked(checkpoint["history"])
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


class _Interruption:
    """Saves checkpoints between two steps, and stops the training; one per rank."""

    def __init__(self, save: Callable[[Checkpoint], None], pauses: Pauses, course: _Course) -> None:
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
def _interruptible(checkpointing: Checkpointing | None, course: _Course) -> Iterator[_Interruption | None]:
    """Yield what saves and stops a training, for which SIGINT and SIGTERM wait for the end of a step."""
    if checkpointing is None:
        yield None
        return
    with stop_requests() as stop_requested:
        max_minutes = checkpointing.max_minutes if rank() == 0 else None  # one clock decides
        pauses = Pauses(stop_requested, checkpointing.minutes, max_minutes)
        interruption = _Interruption(checkpointing.save, pauses, course)
        yield interruption
        if stop_requested():  # after the last step
            interruption.stop()


def _packed(history: Sequence[HistoryRow]) -> dict[str, Any]:
    """Return rows with equal columns as one float64 tensor `[rows, columns]`, a tenth of their size in a file."""
    columns = list(history[0]) if history else []
    values = [[row[column] for column in columns] for row in history]
    return {"columns": columns, "values": torch.tensor(values, dtype=torch.float64)}


def _unpacked(history: dict[str, Any]) -> list[HistoryRow]:
    rows = [dict(zip(history["columns"], values, strict=True)) for values in history["values"].tolist()]
    return [row | {"step": int(row["step"])} for row in rows]


class _Steps:
    """The parts of a step that `trainer.train` calls.

    Attributes:
        lr_factor: of all learning rates.
        rates: group -> learning rate of the current step; for Prodigy, times its current estimate, on the device.
        grad_norms: `<branch>/<kind>` -> gradient norm of the current step before clipping, on the device.
    """

    def __init__(
        self,
        model: TrainableModel,
        data: TrainingData,
        params: TrainingParams,
        state: TrainingState,
        execution: Execution,
    ) -> None:
        self.state, self.params, self.execution = state, params, execution
        self.device = data.reference.mean.device
        self._model, self._data = model, data
        self._batches = BatchSource(data, params, model.objective)
        self._members = self._indices(lambda group: f"{group.branch}/{group.kind}")
        clipped = self._indices(lambda group: group.kind if params.clip == "apart" else "")
        self._clipped_together = [([state.parameters[i] for i in members], members) for members in clipped.values()]
        self._encoded = _encode_all(model, self._batches.prompts) if model.has_constant_prompts else None
        self.lr_factor = 1.0
        self.rates: dict[str, float | torch.Tensor] = {}
        self.grad_norms: dict[str, torch.Tensor] = {}
        self._measured = False
        self._run: Passes[Batch] = functools.partial(self._passes, backward=state.backward)
        if execution.as_graph:
            self._run = GraphedPasses(self._run, state.parameters)

    def _indices(self, key_of: Callable[[ParameterGroup], str]) -> dict[str, torch.Tensor]:
        """Return key -> indices of the groups with that key, on the device."""
        indices: dict[str, list[int]] = {}
        for index, group in enumerate(self._model.groups):
            indices.setdefault(key_of(group), []).append(index)
        return {key: torch.tensor(members, device=self.device) for key, members in indices.items()}

    def set_rates(self, step: int) -> None:
        """Set the learning rate of every group, and β₁ of Adam where it is scheduled. `step` counts from 0."""
        params, num_steps = self.params, self.params.num_steps
        by_parameter = {
            id(group["params"][0]): (optimizer, group)
            for optimizer in self.state.optimizers
            for group in optimizer.param_groups
        }
        self.rates = {}
        for parameter, group in zip(self.state.parameters, self._model.groups, strict=True):
            optimizer, target = by_parameter[id(parameter)]
            schedule = params.words_schedule if group.kind == WORDS else params.schedule
            target["lr"] = self.lr_factor * group.lr * schedule_factor(schedule, step, num_steps)
            if (beta1 := scheduled_beta1(schedule, step, num_steps)) is not None:
                target["betas"] = (beta1, *target["betas"][1:])
            self.rates[group.name] = rate_of(optimizer, target)

    def null_losses(self) -> list[float]:
        """Return the losses of predicting zeros in the first steps, without the reconstruction loss."""
        losses = []
        for step in range(min(WINDOW, max(1, self.params.num_steps))):
            batch = self._batches.draw(step)
            by_row = row_losses(torch.zeros_like(batch.latents), batch, self._model.objective, self.params.loss)
            losses.append((batch.row_weight * by_row).sum())
        values: list[float] = torch.stack(losses).tolist()
        return values

    def gradients(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the gradients of a step; return its loss `[]` and `StepRecord.parts`, all on the device.

        `step` counts from 0.
        """
        batch = self._batches.draw(step)
        if self._encoded is not None:
            batch = self._batches.with_all_prompts(batch, step)
        self._draw_dropout(batch, step)
        loss, parts = self._run(batch)
        if num_ranks() > 1:
            gradients = [parameter.grad for parameter in self.state.parameters if parameter.grad is not None]
            sum_over_ranks([*gradients, loss, *parts.values()])
        return loss, parts

    def _passes(self, batch: Batch, backward: Backward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the passes of a batch, forward and backward, for the rows of this rank: the sums over ranks are the step.

        Means over rows are sums divided by the rows of the whole batch.
        """
        rows, num_reference = rows_of_rank(len(batch)), self.params.batch_size
        size = self.execution.micro_batch or len(batch)
        with packed_factors(self._model):
            if rows == slice(0, len(batch)) and size >= len(batch):
                passes = [self._pass(batch, rows, self._encoded, backward)]
            else:
                passes = self._micro_batches(batch, rows, size, backward)
        guidance = torch.cat([each.guidance for each in passes])
        by_row = torch.cat([each.row_losses for each in passes])
        first_other = max(0, num_reference - rows.start)
        parts = {"loss_reference": by_row[:first_other].sum() / num_reference}
        if len(batch) > num_reference:
            parts["loss_regularization"] = by_row[first_other:].sum() / (len(batch) - num_reference)
        if self.params.loss.reconstruction_weight:
            parts["loss_reconstruction"] = _sum([each.reconstruction for each in passes])
        parts["guidance_scale"] = guidance.sum() / len(batch)
        return _sum([each.loss for each in passes]), parts

    def _micro_batches(self, batch: Batch, share: slice, size: int, backward: Backward) -> list[_Pass]:
        """Run passes of `size` rows over a share of the rows; they add up their gradients.

        Prompts are encoded once: the passes end at copies of the text states, whose gradients then go through the text
        encoders in one backward pass.
        """
        conditioning = self._encoded
        if conditioning is None:
            conditioning = encode_prompts(self._model, batch.tokens)
        leaves, copied = detached_leaves(conditioning)
        passes = []
        for start in range(share.start, share.stop, size):
            rows = slice(start, min(start + size, share.stop))
            with ExitStack() as masks:
                for adapters in self._model.latent_adapters:
                    masks.enter_context(adapters.masks_of_rows(rows, len(batch)))
                passes.append(self._pass(batch[rows], rows, copied, backward))
        if leaves:
            torch.autograd.backward([tensor for tensor, _ in leaves], [leaf.grad for _, leaf in leaves])
        return passes

    def _pass(self, batch: Batch, rows: slice, conditioning: Conditioning | None, backward: Backward) -> _Pass:
        """Run one forward and backward pass.

        Args:
            batch: the rows of this pass.
            rows: their place in the batch of the step.
            conditioning: of `batch.tokens`; None computes it.
            backward: adds the gradients of a scalar loss.
        """
        params, model = self.params, self._model
        guidance = guidance_at(params.guidance_scale, model.objective.noise_level(batch.timesteps))
        prediction = combined_prediction(model, batch, guidance, conditioning)
        by_row = row_losses(prediction, batch, model.objective, params.loss)
        loss, reconstruction = (batch.row_weight * by_row).sum(), by_row.new_zeros(())
        num_reference = min(rows.stop, params.batch_size) - rows.start
        if params.loss.reconstruction_weight and num_reference > 0:
            norm, predicted = params.loss.reconstruction_norm, prediction[:num_reference]
            mean = reconstruction_loss(model, predicted, batch, self._data.pixels, norm)
            reconstruction = mean * (num_reference / params.batch_size)
            loss = loss + params.loss.reconstruction_weight * reconstruction
        backward(loss)
        return _Pass(loss.detach(), by_row.detach(), guidance, reconstruction.detach())

    def _draw_dropout(self, batch: Batch, step: int) -> None:
        """Draw the dropout masks of all adapters before the forward pass."""
        adapters_by_rows = [
            (len(batch.tokens), self._model.prompt_adapters),
            (len(batch), self._model.latent_adapters),
        ]
        adapters = [(rows, each) for rows, stacks in adapters_by_rows for each in stacks if each.has_dropout]
        if adapters and not self._measured:
            with ExitStack() as measuring, torch.no_grad():
                for _, each in adapters:
                    measuring.enter_context(each.measuring())
                first_row = batch[:1]
                combined_prediction(self._model, first_row, torch.ones_like(first_row.row_weight), self._encoded)
            self._measured = True
        generator = step_generator(self.params.seed, "dropout", step, self.device)
        for rows, each in adapters:
            each.draw_masks(rows, generator)

    def clip(self, norms: torch.Tensor) -> None:
        """Clip the gradients."""
        self.grad_norms = {name: norms[members].norm() for name, members in self._members.items()}
        for parameters, members in self._clipped_together:
            nn.utils.clip_grads_with_norm_(parameters, self.params.max_grad_norm, norms[members].norm())


@dataclass(frozen=True)
class _Pass:
    """The results of a forward and backward pass, without gradients.

    Attributes:
        loss: `[]`, the part of these rows in the loss of the step.
        row_losses: `[B]`.
        guidance: s, `[B]`.
        reconstruction: `[]`, the part of these rows in the mean over the reference rows.
    """

    loss: torch.Tensor
    row_losses: torch.Tensor
    guidance: torch.Tensor
    reconstruction: torch.Tensor


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).sum()


@torch.no_grad()
def _encode_all(model: TrainableModel, tokens: PromptTokens) -> Conditioning:
    """Return the conditioning of all prompts, nb·P rows, a few rows at a time."""
    rows = tokens.branches_in_rows()
    parts = [
        model.encode(rows[torch.arange(start, min(start + _PROMPTS_AT_ONCE, len(rows)), device=rows.ids.device)])
        for start in range(0, len(rows), _PROMPTS_AT_ONCE)
    ]
    encoded: Conditioning = map_tensors(lambda *tensors: torch.cat(tensors), *parts)
    return encoded


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


_OnDevice = tuple[FinishedStep[dict[str, torch.Tensor]], dict[str, float | torch.Tensor], dict[str, torch.Tensor]]
"""A finished step, its learning rates, and its gradient norms."""


def _run(
    steps: _Steps, course: _Course, on_preview: Callable[[int], None] | None, interruption: _Interruption | None
) -> None:
    """Run all steps, and between two of them what is due: reading, checks, previews, checkpoints.

    Ranks may read losses at different times, but go back to a good state after the same step.
    """
    params, state = steps.params, steps.state
    pending: list[_OnDevice] = []
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
        all_read = preview_due or check_due or done.step % steps.execution.read_every == 0
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
        if interruption and pause_due:
            interruption.take()
        started = time.perf_counter()


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
