"""The loss: a masked squared error, weighted by the signal-to-noise ratio."""

from __future__ import annotations

import torch

from dreamartist_pipeline.core.errors import InputError

WEIGHTINGS = ("none", "min_snr", "soft_min_snr")


def snr_weight(weighting: str, snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Return the weight w(t) of each row's loss, `[B]`.

    none: 1. min_snr: min(snr, γ) / snr (Hang et al. 2023, section 3.4). soft_min_snr: γ³ / (snr² + γ³), the same two
    limits without the kink. Those are the weights of ε; for v-prediction the division by snr becomes one by (snr + 1).

    Args:
        weighting: "none", "min_snr" or "soft_min_snr".
        snr: ᾱ / (1 − ᾱ), `[B]`.
        gamma: γ, the ratio above which the weight falls.
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
            f"expected a weighting among {', '.join(WEIGHTINGS)}, got {weighting!r}; correct loss.weighting"
        )
    return weight if prediction_type == "epsilon" else weight * snr / (snr + 1)


def masked_mse(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return mean(w · mask · (prediction − target)²) of each row, float32 `[B]`.

    The mask is not normalised: doubling it doubles the loss, as in the reference toolkit.

    Args:
        prediction: `[B, C, h, w]`, any floating dtype.
        target: the same shape.
        weight: w(t), `[B]`.
        mask: attention mask `[B, 1, h, w]`, 0 to 5, or None for 1 everywhere.

    Raises:
        ValueError: prediction and target differ in shape, and broadcasting would hide it.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"expected a prediction of shape {tuple(target.shape)}, got {tuple(prediction.shape)}")
    squared_error = (prediction.float() - target.float()) ** 2
    if mask is not None:
        squared_error = squared_error * mask.float()
    return weight.float() * squared_error.flatten(1).mean(1)
