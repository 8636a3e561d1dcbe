"""Train a concept: one step of DreamArtist++, and the loop around it.

A step draws rows of the reference image and of the regularization set, predicts for both branches in one pass of 2·B
rows, combines the predictions as in classifier-free guidance, and takes the loss of the combination. The base model is
passed in as two callables, so this module is independent of diffusers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from dreamartist_pipeline.core.adapters import AdapterStack
from dreamartist_pipeline.core.branches import BRANCH_NAMES, combine, guidance_at, repeat, rows_of
from dreamartist_pipeline.core.concept import words_part
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.embeddings import WordEmbedding
from dreamartist_pipeline.core.losses import image_error, masked_huber, masked_mse
from dreamartist_pipeline.core.optimizers import flatten, make_optimizers
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens, concatenate
from dreamartist_pipeline.core.schedules import schedule_factor, scheduled_beta1
from dreamartist_pipeline.core.trainer import Averages, FinishedStep, TrainingState, normalized_ema, train
from dreamartist_pipeline.errors import TrainingError
from dreamartist_pipeline.params import LossParams, TrainingParams

ADAPTERS, WORDS = "adapters", "words"
_READ_EVERY_ON_GPU = 10  # steps between reads of the loss; each read synchronizes with the GPU
_DIVERGENCE_REMEDY = "lower the learning rates, or run the base model in float32"

HistoryRow = dict[str, float]


# ------------------------------------------------------------------------------------------------- model and data


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a common learning rate: one LoRA group, or one trigger word.

    Attributes:
        name: as logged, e.g. `unet.0.positive` or `words.positive.pt1`.
        kind: `adapters` or `words`; each kind has its own optimizer.
        branch: `negative`, `positive` or `shared`.
        lr: the peak learning rate, including `scale_lr`.
        parameters: of the group.
        num_layers: number of adapted layers; 0 for words.
    """

    name: str
    kind: str
    branch: str
    lr: float
    parameters: tuple[nn.Parameter, ...] = field(repr=False)
    num_layers: int = 0

    @property
    def num_parameters(self) -> int:
        """The number of trainable scalars."""
        return sum(parameter.numel() for parameter in self.parameters)


def parameter_groups(
    stacks: Mapping[str, AdapterStack], words: Mapping[str, WordEmbedding], words_lr: float
) -> tuple[ParameterGroup, ...]:
    """Return one group per LoRA group of every network, and one per word and text encoder.

    Args:
        stacks: network -> its adapters.
        words: text encoder -> its trigger words.
        words_lr: peak learning rate of the words, including `scale_lr`.
    """
    groups = []
    for adapters in stacks.values():
        parameters, num_layers = adapters.parameters_by_group(), adapters.num_layers_by_group()
        groups += [
            ParameterGroup(g.name, ADAPTERS, g.branch, g.lr, tuple(parameters[g.name]), num_layers[g.name])
            for g in adapters.groups
        ]
    for encoder, embedding in words.items():
        groups += [
            ParameterGroup(f"{words_part(encoder)}.{word.key}", WORDS, BRANCH_NAMES[word.branch], words_lr, (vectors,))
            for word, vectors in zip(embedding.vocabulary.words, embedding.vectors, strict=True)
        ]
    return tuple(groups)


@dataclass(frozen=True)
class TrainableModel:
    """The base model with adapters and words, as the training loop uses it.

    Attributes:
        denoise: (noisy latents `[nb·B, C, h, w]`, timesteps `[nb·B]`, conditioning of nb·B rows) -> prediction.
        encode: tokens `[nb·P, L]`, branches stacked -> conditioning of nb·P rows.
        objective: noising, target and loss weight of the base model.
        groups: all trainable parameters.
        num_branches: nb, 2 (negative, positive) or 1 (positive only).
        half_precision: whether the base model is float16, so that the loss is scaled.
        decode: latents `[B, C, h, w]` -> images `[B, 3, H, W]`, differentiable; needed for the reconstruction loss.
        latent_adapters: adapters used in `denoise`; their dropout masks are drawn before every step.
        prompt_adapters: the same for `encode`.
    """

    denoise: Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
    encode: Callable[[PromptTokens], Conditioning]
    objective: Objective
    groups: tuple[ParameterGroup, ...]
    num_branches: int
    half_precision: bool = False
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    latent_adapters: tuple[AdapterStack, ...] = ()
    prompt_adapters: tuple[AdapterStack, ...] = ()


@dataclass(frozen=True)
class LatentImages:
    """Images as the posterior of the autoencoder, with their prompts.

    Attributes:
        mean: `[N, C, h, w]` float32.
        std: the same shape; a latent is `mean + std · noise`.
        tokens: `[P, nb, L]`, one entry per prompt, branches in order.
        paired: whether prompt i belongs to image i (N = P); otherwise images and prompts are drawn independently.
    """

    mean: torch.Tensor
    std: torch.Tensor
    tokens: PromptTokens
    paired: bool


@dataclass(frozen=True)
class TrainingData:
    """The reference image and the regularization set.

    Attributes:
        reference: the reference image with the prompts of all templates.
        regularization: the regularization set, if there is one.
        mask: attention mask of the reference image at latent size, `[1, 1, h, w]`.
        pixels: the reference image `[1, 3, H, W]` in [-1, 1]; needed for the reconstruction loss.
    """

    reference: LatentImages
    regularization: LatentImages | None = None
    mask: torch.Tensor | None = None
    pixels: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Batch:
    """The random choices of one step: reference rows, followed by regularization rows.

    Attributes:
        latents: z₀, `[B, C, h, w]`.
        noise: ε, `[B, C, h, w]`.
        timesteps: `[B]`.
        tokens: the distinct prompts, `[P, nb, L]`.
        prompt_of_row: index into `tokens`, `[B]`.
        row_weight: `[B]`; the loss of the step is Σ weight · row loss.
        mask: attention mask `[B, 1, h, w]`, or None.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    tokens: PromptTokens
    prompt_of_row: torch.Tensor
    row_weight: torch.Tensor
    mask: torch.Tensor | None


class BatchSource:
    """Draws batches. A batch is a function of the seed and the step."""

    def __init__(self, data: TrainingData, params: TrainingParams, objective: Objective) -> None:
        self._seed, self._objective = params.seed, objective
        self._timesteps, self._noise_offset = params.timesteps, params.noise_offset
        self._device = data.reference.mean.device
        self._sources = [(data.reference, params.batch_size)]
        if data.regularization and params.regularization_batch_size:
            self._sources.append((data.regularization, params.regularization_batch_size))
        self._prompts = concatenate([images.tokens for images, _ in self._sources])
        totals = (1, params.loss.regularization_weight)
        weights = [total / rows for (_, rows), total in zip(self._sources, totals, strict=False) for _ in range(rows)]
        self._row_weight = torch.tensor(weights, device=self._device)
        self._mask = None if data.mask is None else self._row_masks(data.mask)

    def draw(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        mean, std, prompts = self._rows(step_generator(self._seed, "choices", step))
        generator = step_generator(self._seed, "noises", step, self._device)
        noises = torch.randn((2, *mean.shape), generator=generator, device=self._device)
        timesteps = self._objective.sample_timesteps(self._timesteps, len(mean), generator)
        distinct, prompt_of_row = torch.unique(prompts, return_inverse=True)
        return Batch(
            latents=mean + std * noises[0],
            noise=self._offset(noises[1], step),
            timesteps=timesteps,
            tokens=self._prompts[distinct.to(self._device)],
            prompt_of_row=prompt_of_row.to(self._device),
            row_weight=self._row_weight,
            mask=self._mask,
        )

    def _offset(self, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Add `noise_offset · N(0, 1)` per row and channel, so that mean brightness is learned too (Guttenberg 2023).

        The offsets have their own generator, so that the option changes no other random number.
        """
        if not self._noise_offset:
            return noise
        generator = step_generator(self._seed, "noise_offsets", step, self._device)
        offsets = torch.randn((*noise.shape[:2], 1, 1), generator=generator, device=self._device)
        return noise + self._noise_offset * offsets

    def _rows(self, choices: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose images and prompts: mean and std `[B, C, h, w]`, and prompt indices `[B]` on the CPU."""
        means, stds, prompts, first_prompt = [], [], [], 0
        for images, num_rows in self._sources:
            image, prompt = _pick(images, num_rows, choices)
            means.append(images.mean[image])
            stds.append(images.std[image])
            prompts.append(prompt + first_prompt)
            first_prompt += len(images.tokens)
        return torch.cat(means), torch.cat(stds), torch.cat(prompts)

    def _row_masks(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the masks of all rows, `[B, 1, h, w]`: `mask` for reference rows, ones for the others."""
        num_reference = self._sources[0][1]
        ones = torch.ones_like(mask).expand(len(self._row_weight) - num_reference, -1, -1, -1)
        return torch.cat([mask.expand(num_reference, -1, -1, -1), ones])


def _pick(images: LatentImages, num_rows: int, choices: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose an image and a prompt for every row: two index tensors `[num_rows]` on the CPU."""
    prompt = torch.randint(len(images.tokens), (num_rows,), generator=choices)
    if images.paired:
        return prompt, prompt
    return torch.randint(len(images.mean), (num_rows,), generator=choices), prompt


def combined_prediction(model: TrainableModel, batch: Batch, guidance: torch.Tensor) -> torch.Tensor:
    """Return ε̂ = ε_neg + s · (ε_pos − ε_neg) of every row, float32 `[B, C, h, w]`.

    `guidance` is s, `[B]`. The text encoder runs on the distinct prompts only.
    """
    branches = model.num_branches
    conditioning = model.encode(batch.tokens.branches_in_rows())  # nb·P rows
    conditioning = conditioning[rows_of(batch.prompt_of_row, len(batch.tokens), branches)]  # nb·B rows
    noisy_latents = model.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = model.denoise(repeat(noisy_latents, branches), repeat(batch.timesteps, branches), conditioning)
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


def derived_seed(seed: int, purpose: str, step: int | None = None) -> int:
    """Return a 63-bit seed for one purpose (and one step), independent of the seeds of all others."""
    spawn_key = () if step is None else (step,)
    sequence = np.random.SeedSequence([seed, *purpose.encode()], spawn_key=spawn_key)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def step_generator(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for one purpose in one step, so that no random state is kept between steps."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, step))


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
    by_optimizer: dict[str, list[dict[str, Any]]] = {}
    for group, parameter in zip(model.groups, parameters, strict=True):
        settings = params.words if group.kind == WORDS else params
        torch_group = {"params": [parameter], "lr": group.lr, "weight_decay": settings.weight_decay}
        by_optimizer.setdefault(settings.optimizer, []).append(torch_group)
    return TrainingState(
        parameters,
        [optimizer for name, groups in by_optimizer.items() for optimizer in make_optimizers(name, groups)],
        Averages(parameters, normalized_ema(params.ema_decay)) if params.ema_decay else None,
        torch.amp.GradScaler(parameters[0].device.type, enabled=model.half_precision),
    )


def fit(
    model: TrainableModel,
    data: TrainingData,
    params: TrainingParams,
    on_step: Callable[[StepRecord], None] | None = None,
    on_preview: Callable[[int], None] | None = None,
    state: TrainingState | None = None,
) -> list[HistoryRow]:
    """Train the model's parameters in place and return one history row per step.

    With averages (`ema_decay`, schedule_free), the parameters hold the averages during `on_preview` and at the end.

    Args:
        model: base model, adapters and words.
        data: images as latents, and prompts as tokens.
        params: of the training.
        on_step: called once per step, in order; on a GPU for several steps at a time, after the loss is read.
        on_preview: called with the number of finished steps: with 0 before the first step, every
            `params.preview.every` steps, and after the last; never if that is 0.
        state: from `training_state`, possibly loaded; None starts a new training.

    Raises:
        TrainingError: a branch receives no gradient in the first step, or the loss or a parameter is not finite.
    """
    state = state or training_state(model, params)
    history: list[HistoryRow] = []
    for record in _records(_Steps(model, data, params, state), on_preview):
        if not math.isfinite(record.loss):
            raise TrainingError(
                expected="a finite loss", got=f"{record.loss} at step {record.step}", remedy=_DIVERGENCE_REMEDY
            )
        history.append(record.row())
        if on_step:
            on_step(record)
    state.keep_averages()
    _check_finite(model.groups)
    return history


def _check_finite(groups: Sequence[ParameterGroup]) -> None:
    """Check the parameters after the last update, whose loss is never computed."""
    for group in groups:
        if not all(parameter.isfinite().all() for parameter in group.parameters):
            raise TrainingError(
                expected=f"finite values in {group.name} after the last step",
                got="infinite values or NaN",
                remedy=_DIVERGENCE_REMEDY,
            )


class _Steps:
    """The parts of a step that `trainer.train` calls.

    Attributes:
        rates: group -> learning rate of the current step; for Prodigy, times its current estimate.
        grad_norms: `<branch>/<kind>` -> gradient norm of the current step before clipping.
    """

    def __init__(self, model: TrainableModel, data: TrainingData, params: TrainingParams, state: TrainingState) -> None:
        self.state, self.params, self.device = state, params, data.reference.mean.device
        self._model, self._data = model, data
        self._batches = BatchSource(data, params, model.objective)
        self._members = self._indices(lambda group: f"{group.branch}/{group.kind}")
        clipped = self._indices(lambda group: group.kind if params.clip == "apart" else "")
        self._clipped_together = [([state.parameters[i] for i in members], members) for members in clipped.values()]
        self.rates: dict[str, float] = {}
        self.grad_norms: dict[str, torch.Tensor] = {}
        self._check_next, self._checked, self._measured = False, False, False

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
            id(group["params"][0]): group for optimizer in self.state.optimizers for group in optimizer.param_groups
        }
        self.rates = {}
        for parameter, group in zip(self.state.parameters, self._model.groups, strict=True):
            target = by_parameter[id(parameter)]
            schedule = params.words_schedule if group.kind == WORDS else params.schedule
            target["lr"] = group.lr * schedule_factor(schedule, step, num_steps)
            if (beta1 := scheduled_beta1(schedule, step, num_steps)) is not None:
                target["betas"] = (beta1, *target["betas"][1:])
            self.rates[group.name] = target["lr"] * target.get("d", 1.0)

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a step, a scalar, and `StepRecord.parts` on the device. `step` counts from 0."""
        params, model = self.params, self._model
        batch = self._batches.draw(step)
        guidance = guidance_at(params.guidance_scale, model.objective.noise_level(batch.timesteps))
        self._draw_dropout(batch, step)
        with packed_factors(model):
            prediction = combined_prediction(model, batch, guidance)
        by_row = row_losses(prediction, batch, model.objective, params.loss)
        loss = (batch.row_weight * by_row).sum()
        reference = slice(params.batch_size)
        parts = {"loss_reference": by_row[reference].mean()}
        if len(by_row) > params.batch_size:
            parts["loss_regularization"] = by_row[params.batch_size :].mean()
        if params.loss.reconstruction_weight:
            norm = params.loss.reconstruction_norm
            reconstruction = reconstruction_loss(model, prediction[reference], batch, self._data.pixels, norm)
            loss = loss + params.loss.reconstruction_weight * reconstruction
            parts["loss_reconstruction"] = reconstruction
        parts["guidance_scale"] = guidance.mean()
        self._check_next = not self._checked and (step + 1 == params.num_steps or self._trains_negative(guidance))
        return loss, {name: part.detach() for name, part in parts.items()}

    def _trains_negative(self, guidance: torch.Tensor) -> bool:
        """Return whether the negative branch, if any, gets a gradient: rows with a scale of exactly 1 give it none."""
        return self._model.num_branches == 1 or bool((guidance != 1).any())

    def _draw_dropout(self, batch: Batch, step: int) -> None:
        """Draw the dropout masks of all adapters before the forward pass."""
        adapters_by_rows = [
            (len(batch.tokens), self._model.prompt_adapters),
            (len(batch.latents), self._model.latent_adapters),
        ]
        adapters = [(rows, each) for rows, stacks in adapters_by_rows for each in stacks if each.has_dropout]
        if adapters and not self._measured:
            with ExitStack() as measuring, torch.no_grad():
                for _, each in adapters:
                    measuring.enter_context(each.measuring())
                combined_prediction(self._model, batch, torch.ones_like(batch.row_weight))
            self._measured = True
        generator = step_generator(self.params.seed, "dropout", step, self.device)
        for rows, each in adapters:
            each.draw_masks(rows, generator)

    def clip(self, norms: torch.Tensor) -> None:
        """Clip the gradients, after checking once that all branches received some."""
        self.grad_norms = {name: norms[members].norm() for name, members in self._members.items()}
        if self._check_next:
            _check_gradients(self.grad_norms)
            self._checked = True
        for parameters, members in self._clipped_together:
            nn.utils.clip_grads_with_norm_(parameters, self.params.max_grad_norm, norms[members].norm())


def _check_gradients(norms: Mapping[str, torch.Tensor]) -> None:
    """Check that adapters and words of every branch received a gradient.

    Args:
        norms: `<branch>/<kind>` -> gradient norm.
    """
    for name, norm in norms.items():
        if norm.item() == 0:
            raise TrainingError(
                expected=f"a nonzero gradient of {name} in the first step",
                got="0",
                remedy="check that every template has a slot and that the base model is trained",
            )


_OnDevice = tuple[FinishedStep[dict[str, torch.Tensor]], dict[str, float], dict[str, torch.Tensor]]
"""A finished step, its learning rates, and its gradient norms."""


def _records(steps: _Steps, on_preview: Callable[[int], None] | None) -> Iterator[StepRecord]:
    params, state = steps.params, steps.state
    read_every = _READ_EVERY_ON_GPU if steps.device.type == "cuda" else 1
    pending: list[_OnDevice] = []
    if on_preview and params.preview.every and state.step == 0:
        on_preview(0)
    started = time.perf_counter()
    for done in train(state, params.num_steps, set_rates=steps.set_rates, loss_of=steps.loss, clip=steps.clip):
        pending.append((done, steps.rates, steps.grad_norms))
        is_last = done.step == params.num_steps
        preview_due = bool(params.preview.every) and (done.step % params.preview.every == 0 or is_last)
        if preview_due or done.step % read_every == 0 or is_last:
            yield from _read(pending, started)
            pending.clear()
            if preview_due and on_preview:
                with state.averaged():
                    on_preview(done.step)
            started = time.perf_counter()


def _read(pending: Sequence[_OnDevice], started: float) -> Iterator[StepRecord]:
    """Read finished steps from the device in one transfer."""
    stacked = [torch.stack([done.loss, *done.parts.values(), *norms.values()]) for done, _, norms in pending]
    values = torch.stack(stacked).tolist()
    seconds = (time.perf_counter() - started) / len(pending)
    for (done, rates, norms), (loss, *others) in zip(pending, values, strict=True):
        num_parts = len(done.parts)
        parts = dict(zip(done.parts, others[:num_parts], strict=True))
        grad_norm = dict(zip(norms, others[num_parts:], strict=True))
        yield StepRecord(done.step, loss, parts, rates, grad_norm, seconds)


# ------------------------------------------------------------------------------------------------- the table


def branch_table(groups: Sequence[ParameterGroup], taken_over: Mapping[str, int] | None = None) -> str:
    """Return a text table of the parameter groups by branch: layers, LoRA parameters, word vectors, learning rates.

    Args:
        groups: all trainable parameters.
        taken_over: group -> number of its layers or vectors that are initialised from a concept; None without one.
    """
    head = f"{'branch':<10}{'group':<24}{'layers':>8}{'parameters':>12}{'vectors':>9}{'lr':>11}"
    head += f"{'from start':>12}" if taken_over is not None else ""
    lines = [head, "-" * len(head)]
    for group in sorted(groups, key=lambda g: g.branch):
        layers = str(group.num_layers) if group.kind == ADAPTERS else "-"
        vectors = str(sum(len(p) for p in group.parameters)) if group.kind == WORDS else "-"
        line = f"{group.branch:<10}{group.name:<24}{layers:>8}{group.num_parameters:>12,}{vectors:>9}{group.lr:>11.2e}"
        lines.append(line + (f"{taken_over.get(group.name, 0):>12}" if taken_over is not None else ""))
    return "\n".join(lines)
