"""Training a concept: one step of the method, and the loop around it.

A step draws rows of the reference image and of the regularization set, runs both branches in one pass of 2·B rows,
combines them as classifier-free guidance does, and asks that combination to explain the noise. Nothing here knows
diffusers: the base model comes as two callables.
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
from dreamartist_pipeline.core.branches import BRANCH_NAMES, GuidanceScale, combine, repeat, rows_of
from dreamartist_pipeline.core.concept import words_part
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.embeddings import WordEmbedding
from dreamartist_pipeline.core.errors import TrainingError
from dreamartist_pipeline.core.losses import image_error, masked_huber, masked_mse
from dreamartist_pipeline.core.optimizers import make_optimizers
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens, concatenate
from dreamartist_pipeline.params import ScheduleParams, TrainingParams

ADAPTERS, WORDS = "adapters", "words"
_READ_EVERY_ON_GPU = 10  # steps between reads of the loss; every read waits for the device
_ONE_CYCLE_START, _ONE_CYCLE_END = 1 / 25, 1 / 25e4  # of the peak; torch.optim.lr_scheduler.OneCycleLR's defaults
_WHAT_MAY_HELP = "lower the learning rates, or run the base model in float32"

HistoryRow = dict[str, float]


# ------------------------------------------------------------------------------------------------- what is trained


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate: one LoRA group, or one trigger word.

    name: as shown and logged, e.g. `unet.0.positive` or `words.positive.pt1`.
    kind: `adapters` or `words`; each kind has its own optimizer.
    branch: `negative`, `positive` or `shared`.
    lr: the peak learning rate, as applied.
    num_layers: layers an adapter group sits on; 0 for words.
    """

    name: str
    kind: str
    branch: str
    lr: float
    parameters: tuple[nn.Parameter, ...] = field(repr=False)
    num_layers: int = 0

    @property
    def num_parameters(self) -> int:
        """Numbers that train."""
        return sum(parameter.numel() for parameter in self.parameters)


def parameter_groups(
    stacks: Mapping[str, AdapterStack], words: Mapping[str, WordEmbedding], words_lr: float
) -> tuple[ParameterGroup, ...]:
    """Return everything that trains: one group per LoRA group of every network, one per word and text encoder.

    Args:
        stacks: network -> its adapters.
        words: text encoder -> the learned words.
        words_lr: the words' peak learning rate, as applied.
    """
    groups = []
    for adapters in stacks.values():
        for spec in adapters.specs:
            parameters = tuple(adapters.parameters_by_group()[spec.name])
            num_layers = adapters.num_layers_by_group()[spec.name]
            groups.append(ParameterGroup(spec.name, ADAPTERS, spec.branch_name, spec.lr, parameters, num_layers))
    for encoder, embedding in words.items():
        for word, vectors in zip(embedding.vocabulary.words, embedding.vectors, strict=True):
            name, branch = f"{words_part(encoder)}.{word.key}", BRANCH_NAMES[word.branch]
            groups.append(ParameterGroup(name, WORDS, branch, words_lr, (vectors,)))
    return tuple(groups)


@dataclass(frozen=True)
class Trainee:
    """The base model with adapters and words in place, as the loop sees it.

    denoise: (noisy latents `[nb·B, C, h, w]`, timesteps `[nb·B]`, conditioning of nb·B rows) -> prediction.
    encode: tokens `[nb·P, L]`, branches stacked -> conditioning of nb·P rows.
    num_branches: nb, 2 (negative, positive) or 1 (positive alone).
    decode: latents `[B, C, h, w]` -> images `[B, 3, H, W]`, with gradients; only the reconstruction loss needs it.
    """

    denoise: Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
    encode: Callable[[PromptTokens], Conditioning]
    objective: Objective
    groups: tuple[ParameterGroup, ...]
    num_branches: int
    half_precision: bool = False  # float16 base: small gradients need a scaled loss
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class LatentImages:
    """Images as the autoencoder's posterior, with their prompts.

    mean, std: `[N, C, h, w]` float32; a latent is `mean + std · noise`.
    tokens: `[P, nb, L]`, one entry per prompt, branches in order.
    paired: prompt i belongs to image i (N = P); otherwise every image may meet every prompt.
    """

    mean: torch.Tensor
    std: torch.Tensor
    tokens: PromptTokens
    paired: bool


@dataclass(frozen=True)
class TrainingData:
    """The reference image, its loss mask `[1, 1, h, w]` at latent size, and the regularization set (or None).

    pixels: the reference image itself, `[1, 3, H, W]` in [-1, 1]; only the reconstruction loss needs it.
    """

    reference: LatentImages
    regularization: LatentImages | None = None
    mask: torch.Tensor | None = None
    pixels: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Batch:
    """The random choices of one step; rows are reference rows first, then regularization rows.

    latents, noise: `[B, C, h, w]`. timesteps: `[B]`. tokens: `[P, nb, L]`, the distinct prompts.
    prompt_of_row: `[B]` into them. row_weight: `[B]`, such that the step's loss is Σ weight · row loss.
    mask: `[B, 1, h, w]` or None.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    tokens: PromptTokens
    prompt_of_row: torch.Tensor
    row_weight: torch.Tensor
    mask: torch.Tensor | None


class BatchSource:
    """Draws batches; all of its randomness comes from one seed."""

    def __init__(self, data: TrainingData, params: TrainingParams, objective: Objective) -> None:
        self._data = data
        self._num_reference = params.batch_size
        self._num_regularization = params.regularization_batch_size if data.regularization else 0
        self._objective, self._timesteps = objective, params.timesteps
        self._noise_offset = params.noise_offset
        self._choices = torch.Generator().manual_seed(derived_seed(params.seed, "choices"))
        device = data.reference.mean.device
        self._noises = torch.Generator(device).manual_seed(derived_seed(params.seed, "noises"))
        self._offsets = torch.Generator(device).manual_seed(derived_seed(params.seed, "noise_offsets"))
        self._prompts = data.reference.tokens
        if data.regularization:
            self._prompts = concatenate([self._prompts, data.regularization.tokens])  # [P + N, nb, L]
        self._row_weight = self._weights(params.loss.regularization_weight).to(device)
        self._mask = self._row_masks()

    def draw(self) -> Batch:
        """Return the next batch."""
        device = self._data.reference.mean.device
        mean, std, prompts = self._rows()
        noises = torch.randn((2, *mean.shape), generator=self._noises, device=device)
        timesteps = self._objective.sample_timesteps(self._timesteps, len(mean), self._noises)
        distinct, prompt_of_row = torch.unique(prompts, return_inverse=True)
        return Batch(
            latents=mean + std * noises[0],
            noise=self._shifted(noises[1]),
            timesteps=timesteps,
            tokens=self._prompts[distinct.to(device)],
            prompt_of_row=prompt_of_row.to(device),
            row_weight=self._row_weight,
            mask=self._mask,
        )

    def _shifted(self, noise: torch.Tensor) -> torch.Tensor:
        """Add `noise_offset · N(0, 1)` per row and channel, so that mean brightness is learned too (Guttenberg 2023).

        The offsets have a random stream of their own: with and without them, all else is drawn alike.
        """
        if not self._noise_offset:
            return noise
        shape = (*noise.shape[:2], 1, 1)
        return noise + self._noise_offset * torch.randn(shape, generator=self._offsets, device=noise.device)

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose images and prompts: mean and std `[B, C, h, w]`, prompt index `[B]` on the CPU."""
        reference = self._data.reference
        image, prompt = self._pick(reference, self._num_reference)
        mean, std = reference.mean[image], reference.std[image]
        if self._num_regularization:
            regularization = self._data.regularization
            assert regularization is not None
            image, other = self._pick(regularization, self._num_regularization)
            mean = torch.cat([mean, regularization.mean[image]])
            std = torch.cat([std, regularization.std[image]])
            prompt = torch.cat([prompt, other + len(reference.tokens)])
        return mean, std, prompt

    def _pick(self, images: LatentImages, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = torch.randint(len(images.tokens), (num_rows,), generator=self._choices)
        if images.paired:
            return prompt, prompt
        return torch.randint(len(images.mean), (num_rows,), generator=self._choices), prompt

    def _weights(self, regularization_weight: float) -> torch.Tensor:
        weights = [1 / self._num_reference] * self._num_reference
        weights += [regularization_weight / max(1, self._num_regularization)] * self._num_regularization
        return torch.tensor(weights)

    def _row_masks(self) -> torch.Tensor | None:
        mask = self._data.mask
        if mask is None:
            return None
        unmasked = torch.ones_like(mask).expand(self._num_regularization, -1, -1, -1)
        return torch.cat([mask.expand(self._num_reference, -1, -1, -1), unmasked])  # [B, 1, h, w]


def combined_prediction(trainee: Trainee, batch: Batch, guidance: torch.Tensor) -> torch.Tensor:
    """Return `neg + s · (pos − neg)` for every row, float32 `[B, C, h, w]`.

    `guidance` is s per row, `[B]`. The text encoder runs on the distinct prompts only.
    """
    branches = trainee.num_branches
    conditioning = trainee.encode(batch.tokens.branches_in_rows())  # of nb·P rows
    conditioning = conditioning[rows_of(batch.prompt_of_row, len(batch.tokens), branches)]  # of nb·B rows
    noisy_latents = trainee.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = trainee.denoise(repeat(noisy_latents, branches), repeat(batch.timesteps, branches), conditioning)
    return combine(prediction.float(), guidance, branches)


def row_losses(
    prediction: torch.Tensor,
    batch: Batch,
    objective: Objective,
    weighting: str,
    snr_gamma: float,
    huber_delta: float | None = None,
) -> torch.Tensor:
    """Return each row's SNR-weighted, masked error against its target, float32 `[B]`: squared, or Huber's with a δ."""
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    weight = objective.loss_weight(weighting, snr_gamma, batch.timesteps)
    if huber_delta is not None:
        return masked_huber(prediction, target, weight, batch.mask, huber_delta)
    return masked_mse(prediction, target, weight, batch.mask)


def reconstruction_loss(
    trainee: Trainee, prediction: torch.Tensor, batch: Batch, pixels: torch.Tensor | None, norm: str
) -> torch.Tensor:
    """Return mean(mask · |D(ẑ₀) − x|), or of its square, over the reference rows: a scalar.

    ẑ₀ is what the combined prediction says the latents are, D the frozen autoencoder's decoder, x the reference image
    (the reconstruction constraint of Dong et al. 2022). Not weighted by the signal-to-noise ratio.

    Args:
        trainee: with `decode`.
        prediction: of the reference rows, `[R, C, h, w]`; the first R rows of the batch.
        batch: what was predicted.
        pixels: x, `[1, 3, H, W]` in [-1, 1].
        norm: "l1" or "l2".

    Raises:
        ValueError: there is no decoder or no image.
    """
    if trainee.decode is None or pixels is None:
        raise ValueError("expected a decoder and the reference image's pixels for the reconstruction loss, got none")
    rows, objective = slice(len(prediction)), trainee.objective
    timesteps = batch.timesteps[rows]
    noisy_latents = objective.add_noise(batch.latents[rows], batch.noise[rows], timesteps)
    decoded = trainee.decode(objective.predicted_latents(noisy_latents, prediction, timesteps))
    mask = None if batch.mask is None else batch.mask[rows]
    return image_error(decoded, pixels.expand_as(decoded), mask, norm).mean()


# ------------------------------------------------------------------------------------------------- optimisation


class FlatOptimizer:
    """An optimizer over one kind of parameters, laid end to end in one tensor per group.

    Hundreds of small tensors cost more to update than to train; the parameters become views of a few flat ones, and
    so do their gradients. What is kept may be an average: with `ema_decay` β that of the values after steps 1 … n,
    Σ βⁿ⁻ⁱ θᵢ / Σ βⁿ⁻ⁱ, so that the initial values weigh nothing; with schedule_free the optimizer's own. Steps that the
    gradient scaler skips are not among the n; the learning rates' schedule counts them, for it ends with the training.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        weight_decay: float,
        schedule: ScheduleParams,
        num_steps: int,
        max_grad_norm: float,
        optimizer: str = "adamw",
        ema_decay: float = 0.0,
    ) -> None:
        self._groups = tuple(groups)
        self._flat = [_flatten(group.parameters) for group in groups]
        self._schedule, self._num_steps, self._max_grad_norm = schedule, num_steps, max_grad_norm
        self._optimizers = make_optimizers(optimizer, self._flat, [group.lr for group in groups], weight_decay)
        self._param_groups = [group for each in self._optimizers for group in each.param_groups]
        self._schedule_free: list[Any] = list(self._optimizers) if optimizer == "schedule_free" else []
        self._ema_decay = ema_decay
        self._num_averaged = torch.zeros((), dtype=torch.float64, device=self._flat[0].device)
        self._averages = [flat.detach().clone() for flat in self._flat] if ema_decay else []

    def set_step(self, step: int) -> dict[str, float]:
        """Set every group's learning rate for `step` (from 0), clear gradients, and return the rates by group name.

        Prodigy's rate is the product with the one it has estimated so far.
        """
        factor = schedule_factor(self._schedule, step, self._num_steps)
        rates = {}
        for target, group, flat in zip(self._param_groups, self._groups, self._flat, strict=True):
            target["lr"] = group.lr * factor
            rates[group.name] = target["lr"] * target.get("d", 1.0)
            assert flat.grad is not None
            flat.grad.zero_()
        return rates

    def grad_norms(self) -> dict[str, torch.Tensor]:
        """Return the gradient's norm per branch, scalars on the device."""
        norms: dict[str, list[torch.Tensor]] = {}
        for group, flat in zip(self._groups, self._flat, strict=True):
            assert flat.grad is not None
            norms.setdefault(group.branch, []).append(flat.grad.norm())
        return {branch: torch.stack(values).norm() for branch, values in norms.items()}

    def update(self, total_norm: torch.Tensor, scaler: torch.amp.GradScaler) -> None:
        """Clip the gradient of all groups together to `max_grad_norm` and take one step, without reading back.

        While the scaler is on, a gradient that is not finite skips the step for all groups.
        """
        stepped = total_norm.isfinite()
        # With several optimizers the scaler reads back, too, but asks each about its own gradients, and clipping has
        # spread a NaN to those of all.
        if scaler.is_enabled() and len(self._optimizers) > 1 and not stepped:
            return
        factor = (self._max_grad_norm / (total_norm + 1e-6)).clamp(max=1.0)
        for flat in self._flat:
            assert flat.grad is not None
            flat.grad.mul_(factor)
        for optimizer in self._optimizers:
            scaler.step(optimizer)
        if self._averages:
            self._average(stepped)

    def _average(self, stepped: torch.Tensor) -> None:
        """Take the values into the averages where `stepped`, a scalar on the device, is true; else change nothing."""
        self._num_averaged += stepped
        weight = (1 - self._ema_decay) / (1 - self._ema_decay**self._num_averaged)
        weight = torch.where(stepped, weight, 0).to(torch.float32)
        for average, flat in zip(self._averages, self._flat, strict=True):
            average.lerp_(flat.detach(), weight)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Undo the loss scale in the gradients."""
        for optimizer in self._optimizers:
            scaler.unscale_(optimizer)

    def keep_averages(self) -> None:
        """Put the averages into the parameters, where there are any; training goes on only within `averaged`."""
        for optimizer in self._schedule_free:
            optimizer.eval()
        for average, flat in zip(self._averages, self._flat, strict=bool(self._averages)):
            flat.data.copy_(average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the averages in the parameters within, and afterwards exactly the values that train."""
        if not self._averages and not self._schedule_free:
            yield
            return
        training = [flat.detach().clone() for flat in self._flat]
        self.keep_averages()
        try:
            yield
        finally:
            for optimizer in self._schedule_free:
                optimizer.train()
            for flat, values in zip(self._flat, training, strict=True):
                flat.data.copy_(values)


def _flatten(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """Move parameters into one flat tensor; they and their gradients become views of it and of its gradient."""
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    views = zip(parameters, torch.split(flat.data, sizes), torch.split(flat.grad, sizes), strict=True)
    for parameter, values, gradient in views:
        parameter.data = values.view(parameter.shape)
        parameter.grad = gradient.view(parameter.shape)
    return flat


def schedule_factor(schedule: ScheduleParams, step: int, num_steps: int) -> float:
    """Return the learning rate at `step` (from 0) as a fraction of its peak.

    constant: linear warm-up, then 1. cosine: linear warm-up, then half a cosine to 0. one_cycle: half a cosine from
    1/25 to 1 over the warm-up, then another down to 1/250000 (Smith & Topin 2018, with torch's OneCycleLR defaults).
    """
    warmup = min(schedule.warmup_steps, num_steps)
    progress = (step - warmup) / max(1, num_steps - warmup - 1)
    match schedule.kind:
        case "constant":
            return min(1.0, (step + 1) / (warmup + 1))
        case "cosine":
            return min(1.0, (step + 1) / (warmup + 1)) * _cosine(1.0, 0.0, max(0.0, progress))
        case "one_cycle":
            if step < warmup:
                return _cosine(_ONE_CYCLE_START, 1.0, step / warmup)
            return _cosine(1.0, _ONE_CYCLE_END, progress)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def lr_factor(params: TrainingParams) -> int:
    """Return what `scale_lr` multiplies every learning rate by: the rows of a batch, or 1."""
    return params.batch_size + params.regularization_batch_size if params.scale_lr else 1


def derived_seed(seed: int, purpose: str) -> int:
    """Return a seed for one purpose, so that no two streams of one training are the same."""
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)[0] >> 1)


# ------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Losses are means over rows; `lr` goes by group, `grad_norm` by `<branch>/<kind>` and is that before clipping.
    loss_reconstruction is before its weight; None when it is off.
    """

    step: int  # from 1
    loss: float
    loss_reference: float
    loss_regularization: float | None
    guidance_scale: float
    lr: dict[str, float]
    grad_norm: dict[str, float]
    seconds: float
    loss_reconstruction: float | None = None

    def row(self) -> HistoryRow:
        """Return the record as one flat row: `lr/<group>`, `grad_norm/<branch>/<kind>`."""
        parts = {
            "loss_regularization": self.loss_regularization,
            "loss_reconstruction": self.loss_reconstruction,
        }
        return {
            "step": self.step,
            "loss": self.loss,
            "loss_reference": self.loss_reference,
            **{name: value for name, value in parts.items() if value is not None},
            "guidance_scale": self.guidance_scale,
            **{f"lr/{name}": value for name, value in self.lr.items()},
            **{f"grad_norm/{name}": value for name, value in self.grad_norm.items()},
            "seconds": self.seconds,
        }


def fit(
    trainee: Trainee,
    data: TrainingData,
    params: TrainingParams,
    on_step: Callable[[StepRecord], None] | None = None,
    on_preview: Callable[[int], None] | None = None,
) -> list[HistoryRow]:
    """Train the trainee's parameters in place and return one history row per step.

    Where averages are kept (`ema_decay`, schedule_free), the parameters hold them in `on_preview` and at the end.

    Args:
        trainee: base model, adapters and words.
        data: images as latents, and prompts as tokens.
        params: steps, rows, rates, guidance and loss.
        on_step: called once per step, in order; on a GPU in bursts, because reading the loss waits for the device.
        on_preview: called after every `params.preview.every`-th step with its number, the weights as they would be
            kept then.

    Raises:
        TrainingError: some branch has received no gradient in the first step, or the loss, or what has been learned, is
            no longer finite.
    """
    device = data.reference.mean.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(params.seed, "dropout"))
        history: list[HistoryRow] = []
        for record in _records(trainee, data, params, on_preview):
            if not math.isfinite(record.loss):
                raise TrainingError(
                    f"expected a finite loss; got {record.loss} at step {record.step}; {_WHAT_MAY_HELP}"
                )
            history.append(record.row())
            if on_step:
                on_step(record)
        _check_learned(trainee.groups)
        return history


def _check_learned(groups: Sequence[ParameterGroup]) -> None:
    """Confirm that the last update, whose loss no step sees, has left finite numbers everywhere."""
    for group in groups:
        if not all(parameter.isfinite().all() for parameter in group.parameters):
            raise TrainingError(
                f"expected finite numbers in {group.name} after the last step; got others; {_WHAT_MAY_HELP}"
            )


@dataclass(frozen=True)
class _Pending:
    """A finished step whose numbers are still on the device."""

    step: int
    values: torch.Tensor  # loss, reference, regularization, reconstruction, guidance, one gradient norm per name
    lr: dict[str, float]


def _records(
    trainee: Trainee, data: TrainingData, params: TrainingParams, on_preview: Callable[[int], None] | None
) -> Iterator[StepRecord]:
    device = data.reference.mean.device
    read_every = _READ_EVERY_ON_GPU if device.type == "cuda" else 1
    scaler = torch.amp.GradScaler(device.type, enabled=trainee.half_precision)
    optimizers = _optimizers(trainee.groups, params)
    batches = BatchSource(data, params, trainee.objective)
    guidance_scale = GuidanceScale.parse(params.guidance_scale)
    names = [f"{branch}/{kind}" for kind in optimizers for branch in _branches(trainee.groups, kind)]
    pending: list[_Pending] = []
    begun = time.perf_counter()
    checked = False
    for step in range(params.num_steps):
        lr = {n: v for optimizer in optimizers.values() for n, v in optimizer.set_step(step).items()}
        batch = batches.draw()
        guidance = guidance_scale.at(trainee.objective.noise_level(batch.timesteps))
        prediction = combined_prediction(trainee, batch, guidance)
        losses = _row_losses(trainee, prediction, batch, params)
        loss = (batch.row_weight * losses).sum()
        reconstruction = None
        if params.loss.reconstruction_weight:
            rows, norm = slice(params.batch_size), params.loss.reconstruction_norm
            reconstruction = reconstruction_loss(trainee, prediction[rows], batch, data.pixels, norm)
            loss = loss + params.loss.reconstruction_weight * reconstruction
        torch.autograd.backward(scaler.scale(loss))
        check = not checked and (step + 1 == params.num_steps or _reaches_both_branches(trainee, guidance))
        checked = checked or check
        norms = _update(optimizers, scaler, check)
        measured = _measured(loss, losses, reconstruction, guidance, norms, params.batch_size)
        pending.append(_Pending(step + 1, measured, lr))
        preview_due = bool(params.preview.every) and (step + 1) % params.preview.every == 0
        if preview_due or (step + 1) % read_every == 0 or step + 1 == params.num_steps:
            yield from _read(pending, names, begun)
            pending.clear()
            if preview_due and on_preview:
                with ExitStack() as stack:
                    for optimizer in optimizers.values():
                        stack.enter_context(optimizer.averaged())
                    on_preview(step + 1)
            begun = time.perf_counter()
    for optimizer in optimizers.values():
        optimizer.keep_averages()


def _row_losses(trainee: Trainee, prediction: torch.Tensor, batch: Batch, params: TrainingParams) -> torch.Tensor:
    loss = params.loss
    huber_delta = loss.huber_delta if loss.kind == "huber" else None
    return row_losses(prediction, batch, trainee.objective, loss.weighting, loss.snr_gamma, huber_delta)


def _reaches_both_branches(trainee: Trainee, guidance: torch.Tensor) -> bool:
    """Say whether every branch gets a gradient: the negative one gets none from rows with a scale of exactly 1."""
    return trainee.num_branches == 1 or bool((guidance != 1).any())


def _optimizers(groups: Sequence[ParameterGroup], params: TrainingParams) -> dict[str, FlatOptimizer]:
    """Return the adapters' and the words' optimizer, as far as there is something to train."""
    settings = {
        ADAPTERS: (params.weight_decay, params.schedule, params.optimizer),
        WORDS: (params.words.weight_decay, params.words_schedule, params.words.optimizer),
    }
    by_kind = {kind: [group for group in groups if group.kind == kind] for kind in settings}
    optimizers = {}
    for kind, members in by_kind.items():
        if members:
            decay, schedule, name = settings[kind]
            optimizers[kind] = FlatOptimizer(
                members, decay, schedule, params.num_steps, params.max_grad_norm, name, params.ema_decay
            )
    return optimizers


def _branches(groups: Sequence[ParameterGroup], kind: str) -> list[str]:
    return list(dict.fromkeys(group.branch for group in groups if group.kind == kind))


def _update(optimizers: dict[str, FlatOptimizer], scaler: torch.amp.GradScaler, check: bool) -> list[torch.Tensor]:
    """Take one step with every optimizer and return all gradient norms, in the order of `names`."""
    for optimizer in optimizers.values():
        optimizer.unscale(scaler)
    norms = {kind: optimizer.grad_norms() for kind, optimizer in optimizers.items()}
    if check:
        check_gradients(norms)
    for kind, optimizer in optimizers.items():
        optimizer.update(torch.stack(list(norms[kind].values())).norm(), scaler)
    scaler.update()
    return [norm for by_branch in norms.values() for norm in by_branch.values()]


def check_gradients(norms: dict[str, dict[str, torch.Tensor]]) -> None:
    """Confirm that every branch's adapters and words received a gradient.

    Args:
        norms: kind -> branch -> gradient norm.

    Raises:
        TrainingError: one of them is zero; the message names branch and kind.
    """
    for kind, by_branch in norms.items():
        for branch, norm in by_branch.items():
            if norm.item() == 0:
                raise TrainingError(
                    f"expected a gradient for the {kind} of the {branch} branch in the first step; got none; "
                    "check that every template holds a slot and that the base model is a trained one"
                )


def _measured(
    loss: torch.Tensor,
    losses: torch.Tensor,
    reconstruction: torch.Tensor | None,
    guidance: torch.Tensor,
    norms: list[torch.Tensor],
    num_reference: int,
) -> torch.Tensor:
    rows = losses.detach()
    absent = rows.new_tensor(math.nan)
    regularization = rows[num_reference:].mean() if len(rows) > num_reference else absent
    decoded = absent if reconstruction is None else reconstruction.detach()
    return torch.stack([loss.detach(), rows[:num_reference].mean(), regularization, decoded, guidance.mean(), *norms])


def _read(pending: Sequence[_Pending], names: Sequence[str], begun: float) -> Iterator[StepRecord]:
    """Read finished steps from the device in one go."""
    if not pending:
        return
    values = torch.stack([done.values for done in pending]).tolist()
    seconds = (time.perf_counter() - begun) / len(pending)
    for done, (loss, reference, regularization, reconstruction, guidance, *norms) in zip(pending, values, strict=True):
        yield StepRecord(
            step=done.step,
            loss=loss,
            loss_reference=reference,
            loss_regularization=None if math.isnan(regularization) else regularization,
            guidance_scale=guidance,
            lr=done.lr,
            grad_norm=dict(zip(names, norms, strict=True)),
            seconds=seconds,
            loss_reconstruction=None if math.isnan(reconstruction) else reconstruction,
        )


# ------------------------------------------------------------------------------------------------- the table


def branch_table(groups: Sequence[ParameterGroup], taken_over: Mapping[str, int] | None = None) -> str:
    """Return what each branch trains, as lines of text: layers, LoRA parameters, word vectors, learning rates.

    Args:
        groups: everything that trains.
        taken_over: name of a group -> how many of its layers or vectors begin with a concept's values; None when all
            start fresh.
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
