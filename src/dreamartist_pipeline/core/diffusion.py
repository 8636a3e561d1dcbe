"""The training objective of a base model: timesteps, noising, targets and loss weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dreamartist_pipeline.core.losses import snr_weight
from dreamartist_pipeline.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction")


class Objective(Protocol):
    """The training objective of a family of base models. Latents are `[B, C, H, W]`, timesteps `[B]`.

    Timesteps have the unit of the diffusers schedulers of the family, integers or floats.
    """

    @property
    def prediction_type(self) -> str:
        """`prediction_type` of the diffusers schedulers."""

    def check_limits(self, limits: tuple[float, float]) -> None:
        """Check that there are timesteps within `limits`, fractions of the whole range.

        Raises:
            InputError: there are none.
        """

    def check_timesteps(self, timesteps: torch.Tensor) -> None:
        """Check that all timesteps are valid.

        Raises:
            InputError: one is not.
        """

    def sample_timesteps(self, limits: tuple[float, float], num_rows: int, generator: torch.Generator) -> torch.Tensor:
        """Draw training timesteps within `limits`, `[B]`, on the device of the generator."""

    def noise_level(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the position in the range of timesteps, from 0 (clean) to 1 (pure noise): float32 `[B]`."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noisy latents."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the prediction target."""

    def predicted_latents(
        self, noisy_latents: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the clean latents that follow from a prediction."""

    def loss_weight(self, weighting: str, gamma: float, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the loss weight of each row, `[B]`; see `losses.snr_weight` for the weightings."""

    def with_zero_terminal_snr(self) -> Objective:
        """Return the objective with zero SNR at the last timestep.

        Raises:
            InputError: the prediction type does not allow it.
        """


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process z_t = √ᾱ_t · z₀ + √(1 − ᾱ_t) · ε with integer timesteps, and the prediction type.

    Attributes:
        alphas_cumprod: ᾱ, float32 `[T]`, decreasing from almost 1 to almost 0.
        prediction_type: "epsilon", or "v_prediction" (Salimans and Ho 2022).

    Raises:
        InputError: another prediction type.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(
                expected=f"a base model that predicts {' or '.join(PREDICTION_TYPES)}",
                got=f"{self.prediction_type!r}",
                remedy="choose another base model",
            )

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps; t runs from 0 to T − 1."""
        return len(self.alphas_cumprod)

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule rescaled to zero terminal SNR (Lin et al. 2023, algorithm 1).

        √ᾱ is shifted so that its last value is 0, and scaled so that its first value is unchanged.

        Raises:
            InputError: the model predicts ε, which is undefined as a target at zero SNR.
        """
        if self.prediction_type != "v_prediction":
            raise InputError(
                expected="a base model that predicts v_prediction, because training.zero_terminal_snr is true",
                got=f"{self.prediction_type!r}",
                remedy="set zero_terminal_snr to false, or choose another base model",
            )
        levels = self.alphas_cumprod.double().sqrt()
        rescaled = (levels - levels[-1]) * levels[0] / (levels[0] - levels[-1])
        return NoiseSchedule((rescaled**2).to(self.alphas_cumprod.dtype), self.prediction_type)

    def check_limits(self, limits: tuple[float, float]) -> None:
        """Check that `limits` contain a timestep; see `timestep_range`."""
        timestep_range(limits, self.num_train_timesteps)

    def check_timesteps(self, timesteps: torch.Tensor) -> None:
        """Check that all timesteps are integers from 0 to T − 1.

        Raises:
            InputError: one is not.
        """
        last = self.num_train_timesteps - 1
        if timesteps.is_floating_point() or not ((timesteps >= 0) & (timesteps <= last)).all():
            raise InputError(
                expected=f"timesteps as integers from 0 to {last}",
                got=f"{timesteps.tolist()}",
                remedy="correct them",
            )

    def sample_timesteps(self, limits: tuple[float, float], num_rows: int, generator: torch.Generator) -> torch.Tensor:
        """Draw timesteps `[B]` uniformly within `limits`, fractions of T."""
        first, end = timestep_range(limits, self.num_train_timesteps)
        return torch.randint(first, end, (num_rows,), generator=generator, device=generator.device)

    def noise_level(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return t / (T − 1), float32 `[B]`."""
        return timesteps.to(torch.float32) / (self.num_train_timesteps - 1)

    def loss_weight(self, weighting: str, gamma: float, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the SNR weight of each row, `[B]`; see `snr_weight`."""
        return snr_weight(weighting, self.snr(timesteps), gamma, self.prediction_type)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noisy latents z_t, `[B, C, H, W]`, for integer timesteps `[B]`."""
        signal_level, noise_level = self._levels(latents, timesteps)
        return signal_level * latents + noise_level * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the prediction target, `[B, C, H, W]`: ε, or v = √ᾱ · ε − √(1 − ᾱ) · z₀."""
        if self.prediction_type == "epsilon":
            return noise
        signal_level, noise_level = self._levels(latents, timesteps)
        return signal_level * noise - noise_level * latents

    def predicted_latents(
        self, noisy_latents: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return ẑ₀, `[B, C, H, W]`: (z_t − √(1 − ᾱ) · ε̂) / √ᾱ, or √ᾱ · z_t − √(1 − ᾱ) · v̂."""
        signal_level, noise_level = self._levels(noisy_latents, timesteps)
        if self.prediction_type == "epsilon":
            return (noisy_latents - noise_level * prediction) / signal_level
        return signal_level * noisy_latents - noise_level * prediction

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the signal-to-noise ratio ᾱ / (1 − ᾱ) as `[B]`."""
        alphas = self.alphas_cumprod[timesteps]
        return alphas / (1 - alphas)

    def _levels(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return √ᾱ and √(1 − ᾱ), shaped to broadcast with `latents`."""
        alphas = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (latents.dim() - 1))  # [B, 1, 1, 1]
        return alphas.sqrt().to(latents.dtype), (1 - alphas).sqrt().to(latents.dtype)


def timestep_range(limits: tuple[float, float], num_train_timesteps: int) -> tuple[int, int]:
    """Return the range [first, end) of timesteps within `limits`, fractions of T.

    Raises:
        InputError: the range is empty.
    """
    first, end = (round(limit * num_train_timesteps) for limit in limits)
    if first >= end:
        raise InputError(
            expected=f"training.timesteps to contain at least one of {num_train_timesteps} timesteps",
            got=f"{list(limits)}, which contains none",
            remedy="widen the range",
        )
    return first, end
