"""Noising, signal-to-noise ratio and the two prediction targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dreamartist_pipeline.core.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process z_t = √ᾱ_t · z₀ + √(1 − ᾱ_t) · ε, and what the base model predicts.

    Attributes:
        alphas_cumprod: ᾱ, float32 `[T]`, falling from almost 1 to almost 0.
        prediction_type: "epsilon", or "v_prediction" (Salimans and Ho 2022).

    Raises:
        InputError: another prediction type.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"expected a base model that predicts {' or '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}; "
                "choose another base model"
            )

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps; t runs from 0 to T − 1."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return the same schedule on another device."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule rescaled so that the last timestep holds no signal (Lin et al. 2023, algorithm 1).

        √ᾱ is shifted until its last value is 0 and scaled until its first is as before.

        Raises:
            InputError: the model predicts ε, which says nothing about the image where there is no signal.
        """
        check_zero_terminal_snr(self.prediction_type)
        levels = self.alphas_cumprod.double().sqrt()
        rescaled = (levels - levels[-1]) * levels[0] / (levels[0] - levels[-1])
        return NoiseSchedule((rescaled**2).to(self.alphas_cumprod.dtype), self.prediction_type)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noisy latents z_t: all `[B, C, H, W]`, for integer timesteps `[B]`."""
        signal_level, noise_level = self._levels(latents, timesteps)
        return signal_level * latents + noise_level * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the model should predict, `[B, C, H, W]`: ε, or v = √ᾱ · ε − √(1 − ᾱ) · z₀."""
        if self.prediction_type == "epsilon":
            return noise
        signal_level, noise_level = self._levels(latents, timesteps)
        return signal_level * noise - noise_level * latents

    def predicted_latents(
        self, noisy_latents: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return ẑ₀ `[B, C, H, W]`: (z_t − √(1 − ᾱ) · ε̂) / √ᾱ, or √ᾱ · z_t − √(1 − ᾱ) · v̂."""
        signal_level, noise_level = self._levels(noisy_latents, timesteps)
        if self.prediction_type == "epsilon":
            return (noisy_latents - noise_level * prediction) / signal_level
        return signal_level * noisy_latents - noise_level * prediction

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the signal-to-noise ratio ᾱ / (1 − ᾱ) as `[B]`."""
        alphas = self.alphas_cumprod[timesteps]
        return alphas / (1 - alphas)

    def _levels(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return √ᾱ and √(1 − ᾱ), each shaped to multiply `latents`."""
        alphas = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (latents.dim() - 1))  # [B, 1, 1, 1]
        return alphas.sqrt().to(latents.dtype), (1 - alphas).sqrt().to(latents.dtype)


def check_zero_terminal_snr(prediction_type: str) -> None:
    """Confirm that a model can be trained where there is no signal.

    Raises:
        InputError: it predicts ε.
    """
    if prediction_type != "v_prediction":
        raise InputError(
            "expected a base model that predicts v_prediction, because training.zero_terminal_snr is true; "
            f"got {prediction_type!r}; set zero_terminal_snr to false, or choose another base model"
        )


def timestep_range(limits: tuple[float, float], num_train_timesteps: int) -> tuple[int, int]:
    """Return the timesteps [first, end) of `limits`, fractions of T that are rounded to whole timesteps.

    Raises:
        InputError: no timestep lies between them.
    """
    first, end = (round(limit * num_train_timesteps) for limit in limits)
    if first >= end:
        raise InputError(
            f"expected training.timesteps to hold at least one of {num_train_timesteps} timesteps; "
            f"got {list(limits)}, which holds none; widen it"
        )
    return first, end
