"""Losses: masked squared or Huber errors with SNR weighting, and the error of decoded images."""

from __future__ import annotations

import torch
from torch import nn

from dreamartist_pipeline.errors import InputError

WEIGHTINGS = ("none", "min_snr", "soft_min_snr")
NORMS = ("l1", "l2")


def snr_weight(weighting: str, snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Return the loss weight w(t) of each row, `[B]`.

    none: 1. min_snr: min(snr, γ) / snr (Hang et al. 2023, section 3.4). soft_min_snr: γ³ / (snr² + γ³), which has the
    same limits and is smooth. These are the weights for ε; v-prediction divides by (snr + 1) instead of snr.

    Args:
        weighting: "none", "min_snr" or "soft_min_snr".
        snr: ᾱ / (1 − ᾱ), `[B]`.
        gamma: γ, the SNR above which the weight decreases.
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        InputError: an unknown weighting.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting == "min_snr":
        weight = (gamma / snr).clamp(max=1)
    elif weighting == "soft_min_snr":
        weight = gamma**3 / (snr**2 + gamma**3)
    else:
        raise InputError(
            expected=f"a weighting among {', '.join(WEIGHTINGS)}", got=f"{weighting!r}", remedy="correct loss.weighting"
        )
    return weight if prediction_type == "epsilon" else weight * snr / (snr + 1)


def masked_mse(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return mean(w · mask · (prediction − target)²) of each row, float32 `[B]`.

    The mask is not normalised, as in the reference toolkit: doubling it doubles the loss.

    Args:
        prediction: `[B, C, h, w]`, any floating dtype.
        target: the same shape.
        weight: w(t), `[B]`.
        mask: attention mask `[B, 1, h, w]`, 0 to 5, or None for 1 everywhere.

    Raises:
        ValueError: prediction and target differ in shape.
    """
    return weight.float() * _row_means(_error(prediction, target) ** 2, mask)


def masked_huber(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None, delta: float
) -> torch.Tensor:
    """Return mean(w · mask · h(prediction − target)) of each row, float32 `[B]`, with the smooth Huber loss h.

    h(e) = 2δ · (√(e² + δ²) − δ) (pseudo-Huber, scaled as in Khrapov et al. 2024): e² for |e| ≪ δ, 2δ|e| for |e| ≫ δ.

    Args:
        prediction, target, weight, mask: see `masked_mse`.
        delta: δ.

    Raises:
        ValueError: prediction and target differ in shape.
    """
    squared_error = _error(prediction, target) ** 2
    # Equal to the formula above, but without cancellation for small errors.
    huber = 2 * delta * squared_error / ((squared_error + delta**2).sqrt() + delta)
    return weight.float() * _row_means(huber, mask)


def image_error(decoded: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor | None, norm: str) -> torch.Tensor:
    """Return mean(mask · |decoded − pixels|), or the mean of squares, of each row, float32 `[B]`.

    Args:
        decoded: `[B, 3, H, W]`, approximately in [-1, 1].
        pixels: the same shape.
        mask: attention mask `[B, 1, h, w]`, resized to H × W by nearest neighbour; None for 1 everywhere.
        norm: "l1" or "l2".

    Raises:
        InputError: an unknown norm.
        ValueError: the images differ in shape.
    """
    if norm not in NORMS:
        raise InputError(
            expected=f"a norm among {', '.join(NORMS)}", got=f"{norm!r}", remedy="correct loss.reconstruction_norm"
        )
    error = _error(decoded, pixels)
    if mask is not None:
        mask = nn.functional.interpolate(mask.float(), size=pixels.shape[-2:], mode="nearest")
    return _row_means(error.abs() if norm == "l1" else error**2, mask)


def _error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if prediction.shape != target.shape:
        raise ValueError(f"expected a prediction of shape {tuple(target.shape)}, got {tuple(prediction.shape)}")
    return prediction.float() - target.float()


def _row_means(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    masked = values if mask is None else values * mask.float()
    return masked.flatten(1).mean(1)
