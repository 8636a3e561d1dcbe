"""Training a concept: one step of the method, and the loop around it.

A step draws rows of the reference image and of the regularization set, runs both branches in one pass of 2·B rows,
combines them as classifier-free guidance does, and trains that combination to predict the noise. Nothing here knows
diffusers: the base model comes as two callables.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
from dreamartist_pipeline.core.trainer import Averages, TrainingState, normalized_ema, train
from dreamartist_pipeline.errors import TrainingError
from dreamartist_pipeline.params import ScheduleParams, TrainingParams

ADAPTERS, WORDS = "adapters", "words"
_READ_EVERY_ON_GPU = 10  # steps between reads of the loss; every read waits for the device
_WHAT_MAY_HELP = "lower the learning rates, or run the base model in float32"

HistoryRow = dict[str, float]
_Key = TypeVar("_Key")


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
        for group in adapters.groups:
            parameters = tuple(adapters.parameters_by_group()[group.name])
            num_layers = adapters.num_layers_by_group()[group.name]
            groups.append(ParameterGroup(group.name, ADAPTERS, group.branch, group.lr, parameters, num_layers))
    for encoder, embedding in words.items():
        for word, vectors in zip(embedding.vocabulary.words, embedding.vectors, strict=True):
            name, branch = f"{words_part(encoder)}.{word.key}", BRANCH_NAMES[word.branch]
            groups.append(ParameterGroup(name, WORDS, branch, words_lr, (vectors,)))
    return tuple(groups)


@dataclass(frozen=True)
class TrainableModel:
    """The base model with adapters and words in place, as the loop sees it.

    denoise: (noisy latents `[nb·B, C, h, w]`, timesteps `[nb·B]`, conditioning of nb·B rows) -> prediction.
    encode: tokens `[nb·P, L]`, branches stacked -> conditioning of nb·P rows.
    num_branches: nb, 2 (negative, positive) or 1 (positive alone).
    latent_adapters, prompt_adapters: those in `denoise` and in `encode`, whose dropout is drawn before every step.
    decode: latents `[B, C, h, w]` -> images `[B, 3, H, W]`, with gradients; only the reconstruction loss needs it.
    """

    denoise: Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
    encode: Callable[[PromptTokens], Conditioning]
    objective: Objective
    groups: tuple[ParameterGroup, ...]
    num_branches: int
    half_precision: bool = False  # float16 base: small gradients need a scaled loss
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    latent_adapters: tuple[AdapterStack, ...] = ()
    prompt_adapters: tuple[AdapterStack, ...] = ()


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
    """Draws batches; the batch of a step depends on the seed and the step alone."""

    def __init__(self, data: TrainingData, params: TrainingParams, objective: Objective) -> None:
        self._data = data
        self._num_reference = params.batch_size
        self._num_regularization = params.regularization_batch_size if data.regularization else 0
        self._objective, self._timesteps = objective, params.timesteps
        self._noise_offset = params.noise_offset
        self._seed = params.seed
        device = data.reference.mean.device
        self._prompts = data.reference.tokens
        if data.regularization:
            self._prompts = concatenate([self._prompts, data.regularization.tokens])  # [P + N, nb, L]
        self._row_weight = self._weights(params.loss.regularization_weight).to(device)
        self._mask = self._row_masks()

    def draw(self, step: int) -> Batch:
        """Return the batch of a step, from 0."""
        device = self._data.reference.mean.device
        mean, std, prompts = self._rows(step_generator(self._seed, "choices", step))
        noises_of_step = step_generator(self._seed, "noises", step, device)
        noises = torch.randn((2, *mean.shape), generator=noises_of_step, device=device)
        timesteps = self._objective.sample_timesteps(self._timesteps, len(mean), noises_of_step)
        distinct, prompt_of_row = torch.unique(prompts, return_inverse=True)
        return Batch(
            latents=mean + std * noises[0],
            noise=self._shifted(noises[1], step),
            timesteps=timesteps,
            tokens=self._prompts[distinct.to(device)],
            prompt_of_row=prompt_of_row.to(device),
            row_weight=self._row_weight,
            mask=self._mask,
        )

    def _shifted(self, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Add `noise_offset · N(0, 1)` per row and channel, so that mean brightness is learned too (Guttenberg 2023).

        The offsets have a generator of their own: with and without them, all else is drawn alike.
        """
        if not self._noise_offset:
            return noise
        shape = (*noise.shape[:2], 1, 1)
        offsets = step_generator(self._seed, "noise_offsets", step, noise.device)
        return noise + self._noise_offset * torch.randn(shape, generator=offsets, device=noise.device)

    def _rows(self, choices: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose images and prompts: mean and std `[B, C, h, w]`, prompt index `[B]` on the CPU."""
        reference = self._data.reference
        image, prompt = _pick(reference, self._num_reference, choices)
        mean, std = reference.mean[image], reference.std[image]
        if self._num_regularization:
            regularization = self._data.regularization
            assert regularization is not None
            image, other = _pick(regularization, self._num_regularization, choices)
            mean = torch.cat([mean, regularization.mean[image]])
            std = torch.cat([std, regularization.std[image]])
            prompt = torch.cat([prompt, other + len(reference.tokens)])
        return mean, std, prompt

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


def _pick(images: LatentImages, num_rows: int, choices: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose an image and a prompt for every row: indices `[num_rows]` on the CPU."""
    prompt = torch.randint(len(images.tokens), (num_rows,), generator=choices)
    if images.paired:
        return prompt, prompt
    return torch.randint(len(images.mean), (num_rows,), generator=choices), prompt


def combined_prediction(model: TrainableModel, batch: Batch, guidance: torch.Tensor) -> torch.Tensor:
    """Return `neg + s · (pos − neg)` for every row, float32 `[B, C, h, w]`.

    `guidance` is s per row, `[B]`. The text encoder runs on the distinct prompts only.
    """
    branches = model.num_branches
    conditioning = model.encode(batch.tokens.branches_in_rows())  # of nb·P rows
    conditioning = conditioning[rows_of(batch.prompt_of_row, len(batch.tokens), branches)]  # of nb·B rows
    noisy_latents = model.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = model.denoise(repeat(noisy_latents, branches), repeat(batch.timesteps, branches), conditioning)
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
    model: TrainableModel, prediction: torch.Tensor, batch: Batch, pixels: torch.Tensor | None, norm: str
) -> torch.Tensor:
    """Return mean(mask · |D(ẑ₀) − x|), or of its square, over the reference rows: a scalar.

    ẑ₀ is what the combined prediction says the latents are, D the frozen autoencoder's decoder, x the reference image
    (the reconstruction constraint of Dong et al. 2022). Not weighted by the signal-to-noise ratio.

    Args:
        model: with `decode`.
        prediction: of the reference rows, `[R, C, h, w]`; the first R rows of the batch.
        batch: what was predicted.
        pixels: x, `[1, 3, H, W]` in [-1, 1].
        norm: "l1" or "l2".

    Raises:
        ValueError: there is no decoder or no image.
    """
    if model.decode is None or pixels is None:
        raise ValueError("expected a decoder and the reference image's pixels for the reconstruction loss, got none")
    rows, objective = slice(len(prediction)), model.objective
    timesteps = batch.timesteps[rows]
    noisy_latents = objective.add_noise(batch.latents[rows], batch.noise[rows], timesteps)
    decoded = model.decode(objective.predicted_latents(noisy_latents, prediction, timesteps))
    mask = None if batch.mask is None else batch.mask[rows]
    return image_error(decoded, pixels.expand_as(decoded), mask, norm).mean()


def lr_factor(params: TrainingParams) -> int:
    """Return what `scale_lr` multiplies every learning rate by: the rows of a batch, or 1."""
    return params.batch_size + params.regularization_batch_size if params.scale_lr else 1


def derived_seed(seed: int, purpose: str, step: int | None = None) -> int:
    """Return a seed of 63 bits for one purpose, and one step of it, so that no two draws of a training are the same."""
    spawn_key = () if step is None else (step,)
    sequence = np.random.SeedSequence([seed, *purpose.encode()], spawn_key=spawn_key)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def step_generator(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for one purpose in one step: no random state has to be kept between steps."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, step))


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


def training_state(model: TrainableModel, params: TrainingParams) -> TrainingState:
    """Return the state of a training before its first step; the model's parameters become views of the state's.

    There is one flat parameter per group. Averages are kept with `ema_decay`, without the steps that the gradient
    scaler skips; the schedule of the learning rates counts those, for it ends with the training.
    """
    parameters = [flatten(group.parameters) for group in model.groups]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for group, parameter in zip(model.groups, parameters, strict=True):
        settings = _settings(params, group.kind)
        torch_group = {"params": [parameter], "lr": group.lr, "weight_decay": settings.weight_decay}
        by_name.setdefault(settings.optimizer, []).append(torch_group)
    return TrainingState(
        parameters,
        [optimizer for name, groups in by_name.items() for optimizer in make_optimizers(name, groups)],
        Averages(parameters, normalized_ema(params.ema_decay)) if params.ema_decay else None,
        torch.amp.GradScaler(parameters[0].device.type, enabled=model.half_precision),
    )


@dataclass(frozen=True)
class _Settings:
    """How one kind of parameters is optimised."""

    optimizer: str
    weight_decay: float
    schedule: ScheduleParams


def _settings(params: TrainingParams, kind: str) -> _Settings:
    if kind == WORDS:
        return _Settings(params.words.optimizer, params.words.weight_decay, params.words_schedule)
    return _Settings(params.optimizer, params.weight_decay, params.schedule)


def fit(
    model: TrainableModel,
    data: TrainingData,
    params: TrainingParams,
    on_step: Callable[[StepRecord], None] | None = None,
    on_preview: Callable[[int], None] | None = None,
    state: TrainingState | None = None,
) -> list[HistoryRow]:
    """Train the model's trainable parameters in place and return one history row per step.

    Where averages are kept (`ema_decay`, schedule_free), the parameters hold them in `on_preview` and at the end.

    Args:
        model: base model, adapters and words.
        data: images as latents, and prompts as tokens.
        params: steps, rows, rates, guidance and loss.
        on_step: called once per step, in order; on a GPU in bursts, because reading the loss waits for the device.
        on_preview: called after every `params.preview.every`-th step with its number, the weights as they would be
            kept then.
        state: where to begin, from `training_state`; None begins anew.

    Raises:
        TrainingError: some branch has received no gradient in the first step, or the loss, or what has been learned, is
            no longer finite.
    """
    state = state or training_state(model, params)
    history: list[HistoryRow] = []
    for record in _records(_Steps(model, data, params, state), on_preview):
        if not math.isfinite(record.loss):
            raise TrainingError(
                expected="a finite loss", got=f"{record.loss} at step {record.step}", remedy=_WHAT_MAY_HELP
            )
        history.append(record.row())
        if on_step:
            on_step(record)
    state.keep_averages()
    _check_learned(model.groups)
    return history


def _check_learned(groups: Sequence[ParameterGroup]) -> None:
    """Confirm that the last update, whose loss no step sees, has left finite numbers everywhere."""
    for group in groups:
        if not all(parameter.isfinite().all() for parameter in group.parameters):
            raise TrainingError(
                expected=f"finite numbers in {group.name} after the last step", got="others", remedy=_WHAT_MAY_HELP
            )


@dataclass(frozen=True)
class _Pending:
    """A finished step whose numbers are still on the device."""

    step: int
    values: torch.Tensor  # loss, reference, regularization, reconstruction, guidance, one gradient norm per name
    lr: dict[str, float]


class _Steps:
    """The steps of one concept's training, as the loop asks for them.

    Attributes:
        rates: the current step's learning rate by group. Prodigy's is the product with the one it has estimated so far.
        grad_norms: (kind, branch) -> the current step's gradient norm before clipping.
    """

    def __init__(self, model: TrainableModel, data: TrainingData, params: TrainingParams, state: TrainingState) -> None:
        self.state, self.params, self.device = state, params, data.reference.mean.device
        self._model, self._data = model, data
        self._batches = BatchSource(data, params, model.objective)
        self._members = self._indices(lambda group: (group.kind, group.branch))
        clipped = self._indices(lambda group: group.kind if params.clip == "apart" else "")
        self._clipped_together = [([state.parameters[i] for i in members], members) for members in clipped.values()]
        self.rates: dict[str, float] = {}
        self.grad_norms: dict[tuple[str, str], torch.Tensor] = {}
        self._check_next, self._checked, self._measured = False, False, False

    def _indices(self, key_of: Callable[[ParameterGroup], _Key]) -> dict[_Key, torch.Tensor]:
        """Return the indices of the groups that share a key, on the device."""
        indices: dict[_Key, list[int]] = {}
        for index, group in enumerate(self._model.groups):
            indices.setdefault(key_of(group), []).append(index)
        return {key: torch.tensor(members, device=self.device) for key, members in indices.items()}

    @property
    def norm_names(self) -> list[str]:
        """The names of the gradient norms that are reported, `<branch>/<kind>`."""
        return [f"{branch}/{kind}" for kind, branch in self._members]

    def set_rates(self, step: int) -> None:
        """Set every group's learning rate for `step` (from 0), and Adam's β₁ where the schedule says it."""
        by_parameter = {
            id(group["params"][0]): group for optimizer in self.state.optimizers for group in optimizer.param_groups
        }
        self.rates = {}
        for parameter, group in zip(self.state.parameters, self._model.groups, strict=True):
            target, schedule = by_parameter[id(parameter)], _settings(self.params, group.kind).schedule
            target["lr"] = group.lr * schedule_factor(schedule, step, self.params.num_steps)
            if (beta1 := scheduled_beta1(schedule, step, self.params.num_steps)) is not None:
                target["betas"] = (beta1, *target["betas"][1:])
            self.rates[group.name] = target["lr"] * target.get("d", 1.0)

    def loss(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of a step's batch, and its parts: reference, regularization, reconstruction, guidance."""
        params, model = self.params, self._model
        batch = self._batches.draw(step)
        guidance = guidance_at(params.guidance_scale, model.objective.noise_level(batch.timesteps))
        self._draw_dropout(batch, step)
        prediction = combined_prediction(model, batch, guidance)
        losses = _row_losses(model, prediction, batch, params)
        loss = (batch.row_weight * losses).sum()
        reconstruction = None
        if params.loss.reconstruction_weight:
            rows, norm = slice(params.batch_size), params.loss.reconstruction_norm
            reconstruction = reconstruction_loss(model, prediction[rows], batch, self._data.pixels, norm)
            loss = loss + params.loss.reconstruction_weight * reconstruction
        is_last = step + 1 == params.num_steps
        self._check_next = not self._checked and (is_last or _reaches_both_branches(model, guidance))
        return loss, _parts(losses, reconstruction, guidance, params.batch_size)

    def _draw_dropout(self, batch: Batch, step: int) -> None:
        """Draw the step's dropout masks of all adapters, before the pass that applies them."""
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
        masks = step_generator(self.params.seed, "dropout", step, self.device)
        for rows, each in adapters:
            each.draw_masks(rows, masks)

    def clip(self, norms: torch.Tensor) -> None:
        """Clip the gradients, once those of all branches have been verified."""
        self.grad_norms = {key: norms[members].norm() for key, members in self._members.items()}
        if self._check_next:
            check_gradients(self.grad_norms)
            self._checked = True
        for parameters, members in self._clipped_together:
            nn.utils.clip_grads_with_norm_(parameters, self.params.max_grad_norm, norms[members].norm())


def _records(steps: _Steps, on_preview: Callable[[int], None] | None) -> Iterator[StepRecord]:
    params, state = steps.params, steps.state
    read_every = _READ_EVERY_ON_GPU if steps.device.type == "cuda" else 1
    pending: list[_Pending] = []
    begun = time.perf_counter()
    for done in train(state, params.num_steps, set_rates=steps.set_rates, loss_of=steps.loss, clip=steps.clip):
        values = torch.stack([done.loss, *done.parts, *steps.grad_norms.values()])
        pending.append(_Pending(done.step, values, steps.rates))
        preview_due = bool(params.preview.every) and done.step % params.preview.every == 0
        if preview_due or done.step % read_every == 0 or done.step == params.num_steps:
            yield from _read(pending, steps.norm_names, begun)
            pending.clear()
            if preview_due and on_preview:
                with state.averaged():
                    on_preview(done.step)
            begun = time.perf_counter()


def _row_losses(model: TrainableModel, prediction: torch.Tensor, batch: Batch, params: TrainingParams) -> torch.Tensor:
    loss = params.loss
    huber_delta = loss.huber_delta if loss.kind == "huber" else None
    return row_losses(prediction, batch, model.objective, loss.weighting, loss.snr_gamma, huber_delta)


def _reaches_both_branches(model: TrainableModel, guidance: torch.Tensor) -> bool:
    """Say whether every branch gets a gradient: the negative one gets none from rows with a scale of exactly 1."""
    return model.num_branches == 1 or bool((guidance != 1).any())


def check_gradients(norms: Mapping[tuple[str, str], torch.Tensor]) -> None:
    """Confirm that every branch's adapters and words received a gradient.

    Args:
        norms: (kind, branch) -> gradient norm.

    Raises:
        TrainingError: one of them is zero; the message names branch and kind.
    """
    for (kind, branch), norm in norms.items():
        if norm.item() == 0:
            raise TrainingError(
                expected=f"a gradient for the {kind} of the {branch} branch in the first step",
                got="none",
                remedy="check that every template holds a slot and that the base model is a trained one",
            )


def _parts(
    losses: torch.Tensor, reconstruction: torch.Tensor | None, guidance: torch.Tensor, num_reference: int
) -> torch.Tensor:
    """Return the means that are reported: reference, regularization, reconstruction, guidance; NaN where absent."""
    rows = losses.detach()
    absent = rows.new_tensor(math.nan)
    regularization = rows[num_reference:].mean() if len(rows) > num_reference else absent
    decoded = absent if reconstruction is None else reconstruction.detach()
    return torch.stack([rows[:num_reference].mean(), regularization, decoded, guidance.mean()])


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
