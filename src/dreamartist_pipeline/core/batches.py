"""What a training step draws: rows of the reference image and of the regularization set, their noise and timesteps.

What is drawn on the CPU is uploaded for many steps at once, and numbers of prompts are constant: a step does not wait
for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, concatenate
from dreamartist_pipeline.params import TrainingParams

_CHOICES_AHEAD = 64  # steps whose images and prompts are drawn and uploaded together


@dataclass(frozen=True)
class LatentImages:
    """Images as the posterior of the autoencoder, with their prompts.

    Attributes:
        mean: `[N, C, h, w]` float32.
        std: the same shape; a latent is `mean + std · noise`.
        tokens: `[P, nb, L]`, one entry per prompt, branches in order.
        paired: whether prompt i belongs to image i (N = P); otherwise images and prompts are drawn independently.
        framing: `images.Framing.numbers` of each image, `[N, 6]`; None, in all images of a training: whole images.
    """

    mean: torch.Tensor
    std: torch.Tensor
    tokens: PromptTokens
    paired: bool
    framing: torch.Tensor | None = None


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


@dataclass(frozen=True)
class Batch:
    """The random choices of one step: reference rows, followed by regularization rows.

    Attributes:
        latents: z₀, `[B, C, h, w]`.
        noise: ε, `[B, C, h, w]`.
        timesteps: `[B]`.
        tokens: the distinct prompts, `[P, nb, L]`. P is the same in every step: the last prompt is repeated.
        prompt_of_row: index into `tokens`, `[B]`.
        row_weight: `[B]`; the loss of the step is Σ weight · row loss.
        mask: attention mask `[B, 1, h, w]`, or None.
        framing: of the images, `[B, 6]`, or None; see `LatentImages`.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    tokens: PromptTokens
    prompt_of_row: torch.Tensor
    row_weight: torch.Tensor
    mask: torch.Tensor | None
    framing: torch.Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.latents)

    def __getitem__(self, rows: slice) -> Batch:
        """Return a part of the rows, with the same `tokens`."""
        return Batch(
            self.latents[rows],
            self.noise[rows],
            self.timesteps[rows],
            self.tokens,
            self.prompt_of_row[rows],
            self.row_weight[rows],
            None if self.mask is None else self.mask[rows],
            None if self.framing is None else self.framing[rows],
        )


@dataclass(frozen=True)
class _Choices:
    """The images and prompts of several steps, as indices on the device.

    Attributes:
        first_step: of these.
        images: one tensor `[steps, rows]` per source.
        distinct: the distinct prompts, `[steps, P]`.
        prompt_of_row: index into `distinct`, `[steps, B]`.
    """

    first_step: int
    images: tuple[torch.Tensor, ...]
    distinct: torch.Tensor
    prompt_of_row: torch.Tensor


class BatchSource:
    """Draws batches. A batch is a function of the seed and the step."""

    def __init__(self, data: TrainingData, params: TrainingParams, objective: Objective) -> None:
        self._seed, self._objective = params.seed, objective
        self._timesteps, self._noise_offset = params.timesteps, params.noise_offset
        self._device = data.reference.mean.device
        self._sources = [(data.reference, params.batch_size)]
        if data.regularization and params.regularization_batch_size:
            self._sources.append((data.regularization, params.regularization_batch_size))
        self.prompts = concatenate([images.tokens for images, _ in self._sources])
        self._num_distinct = sum(min(len(images.tokens), num_rows) for images, num_rows in self._sources)
        self._choices: _Choices | None = None
        totals = (1, params.loss.regularization_weight)
        weights = [total / rows for (_, rows), total in zip(self._sources, totals, strict=False) for _ in range(rows)]
        self._row_weight = torch.tensor(weights, device=self._device)
        self._mask = None if data.mask is None else self._row_masks(data.mask)

    def draw(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        choices, index = self._choices_of(step)
        mean, std, framing = self._rows(choices, index)
        generator = step_generator(self._seed, "noises", step, self._device)
        noises = torch.randn((2, *mean.shape), generator=generator, device=self._device)
        timesteps = self._objective.sample_timesteps(self._timesteps, len(mean), generator)
        return Batch(
            latents=mean + std * noises[0],
            noise=self._offset(noises[1], step),
            timesteps=timesteps,
            tokens=self.prompts[choices.distinct[index]],
            prompt_of_row=choices.prompt_of_row[index],
            row_weight=self._row_weight,
            mask=self._mask,
            framing=framing,
        )

    def with_all_prompts(self, batch: Batch, step: int) -> Batch:
        """Return the batch of a step with all prompts as `tokens`, for conditioning that was computed before."""
        choices, index = self._choices_of(step)
        return replace(batch, tokens=self.prompts, prompt_of_row=choices.distinct[index][batch.prompt_of_row])

    def _offset(self, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Add `noise_offset · N(0, 1)` per row and channel, so that mean brightness is learned too (Guttenberg 2023).

        The offsets have their own generator, so that the option changes no other random number.
        """
        if not self._noise_offset:
            return noise
        generator = step_generator(self._seed, "noise_offsets", step, self._device)
        offsets = torch.randn((*noise.shape[:2], 1, 1), generator=generator, device=self._device)
        return noise + self._noise_offset * offsets

    def _choices_of(self, step: int) -> tuple[_Choices, int]:
        """Return uploaded choices and the index of the step in them."""
        first_step = step - step % _CHOICES_AHEAD
        if self._choices is None or self._choices.first_step != first_step:
            self._choices = self._draw_choices(first_step)
        return self._choices, step - first_step

    def _draw_choices(self, first_step: int) -> _Choices:
        """Draw the images and prompts of the next steps on the CPU, so that they do not depend on the device."""
        images: list[list[torch.Tensor]] = [[] for _ in self._sources]
        distinct, prompt_of_row = [], []
        for step in range(first_step, first_step + _CHOICES_AHEAD):
            generator = step_generator(self._seed, "choices", step)
            prompts, first_prompt = [], 0
            for (source, num_rows), chosen in zip(self._sources, images, strict=True):
                image, prompt = _pick(source, num_rows, generator)
                chosen.append(image)
                prompts.append(prompt + first_prompt)
                first_prompt += len(source.tokens)
            different, inverse = torch.unique(torch.cat(prompts), return_inverse=True)
            distinct.append(torch.cat([different, different[-1:].expand(self._num_distinct - len(different))]))
            prompt_of_row.append(inverse)
        return _Choices(
            first_step,
            tuple(self._upload(chosen) for chosen in images),
            self._upload(distinct),
            self._upload(prompt_of_row),
        )

    def _upload(self, steps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack and copy to the device; from pinned memory, the copy does not wait for the device."""
        stacked = torch.stack(list(steps))
        if self._device.type == "cuda":
            return stacked.pin_memory().to(self._device, non_blocking=True)
        return stacked.to(self._device)

    def _rows(self, choices: _Choices, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return mean and std `[B, C, h, w]` and the framing `[B, 6]` of the chosen images."""
        chosen = [(source, image[index]) for (source, _), image in zip(self._sources, choices.images, strict=True)]
        framings = [s.framing[image] for s, image in chosen if s.framing is not None]
        return (
            torch.cat([s.mean[image] for s, image in chosen]),
            torch.cat([s.std[image] for s, image in chosen]),
            torch.cat(framings) if framings else None,
        )

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


def derived_seed(seed: int, purpose: str, step: int | None = None) -> int:
    """Return a 63-bit seed for one purpose (and one step), independent of the seeds of all others."""
    spawn_key = () if step is None else (step,)
    sequence = np.random.SeedSequence([seed, *purpose.encode()], spawn_key=spawn_key)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def step_generator(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for one purpose in one step, so that no random state is kept between steps."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, step))
