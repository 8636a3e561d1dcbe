"""One step of DreamArtist++: predictions of both branches in one pass, their combination, its loss and gradients.

A step draws rows of the reference image and of the regularization set, predicts for both branches in one pass of 2·B
rows, combines the predictions as in classifier-free guidance, and takes the loss of the combination. The base model is
passed in as two callables, so this module is independent of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreamartist_pipeline.core.adapters import AdapterStack
from dreamartist_pipeline.core.batches import Batch, BatchSource, TrainingData, step_generator
from dreamartist_pipeline.core.branches import combine, guidance_at, repeat, rows_of
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.divergence import WINDOW
from dreamartist_pipeline.core.losses import image_error, masked_huber, masked_mse
from dreamartist_pipeline.core.optimizers import flatten, make_optimizers, rate_of
from dreamartist_pipeline.core.parameter_groups import WORDS, ParameterGroup
from dreamartist_pipeline.core.processes import num_ranks, rows_of_rank, sum_over_ranks
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens, detached_leaves, map_tensors
from dreamartist_pipeline.core.schedules import schedule_factor, scheduled_beta1
from dreamartist_pipeline.core.step_graph import GraphedPasses, Passes
from dreamartist_pipeline.core.trainer import Averages, Backward, TrainingState, normalized_ema
from dreamartist_pipeline.params import LossParams, TrainingParams

_PROMPTS_AT_ONCE = 16  # rows of one call of the text encoder, where all prompts are encoded before the first step


# ------------------------------------------------------------------------------------------------- the model


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


# ------------------------------------------------------------------------------------------------- all steps


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


class Steps:
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
