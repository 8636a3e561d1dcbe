"""The [negative | positive] batch. The order of the branches is defined here only.

Both branches have the same noisy latents and timesteps, so a batch of `B` images becomes `num_branches · B` rows: the
negative branch first, then the positive branch. With one branch (plain training), all rows are positive. The
predictions are combined as in classifier-free guidance, `neg + s · (pos − neg)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dreamartist_pipeline.params import GuidanceScale

NEGATIVE, POSITIVE = 0, 1
BRANCH_NAMES = ("negative", "positive")

_CURVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ln": lambda r: r,
    "cos": lambda r: torch.cos((r - 1) * math.pi / 2),
    "cos2": lambda r: 1 - torch.cos(r * math.pi / 2),
}


def branches(num_branches: int) -> tuple[int, ...]:
    """Return the branches of a stacked batch in row order: (NEGATIVE, POSITIVE), or (POSITIVE,) for one branch.

    Raises:
        ValueError: `num_branches` is neither 1 nor 2.
    """
    if num_branches not in (1, 2):
        raise ValueError(f"expected 1 or 2 branches, got {num_branches}")
    return (NEGATIVE, POSITIVE)[-num_branches:]


def stack(negative: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Stack the inputs of both branches: two `[B, ...]` give `[2·B, ...]`."""
    return torch.cat([negative, positive])


def repeat(x: torch.Tensor, num_branches: int) -> torch.Tensor:
    """Repeat the rows for every branch: `[B, ...]` becomes `[num_branches·B, ...]`."""
    return torch.cat([x] * num_branches)


def rows_of(index: torch.Tensor, length: int, num_branches: int) -> torch.Tensor:
    """Return the rows of the same entries of every branch, in a stacked batch with `length` rows per branch.

    `index` `[B]` becomes `[num_branches·B]`.
    """
    return torch.cat([index + branch * length for branch in range(num_branches)])


def split(x: torch.Tensor, num_branches: int) -> tuple[torch.Tensor, ...]:
    """Split a stacked batch `[num_branches·B, ...]` into one `[B, ...]` per branch, in row order.

    Raises:
        ValueError: the number of rows is not a multiple of num_branches.
    """
    if x.shape[0] % num_branches:
        raise ValueError(f"expected a multiple of {num_branches} rows, got {x.shape[0]}")
    return x.chunk(num_branches)


def combine(prediction: torch.Tensor, guidance: torch.Tensor, num_branches: int) -> torch.Tensor:
    """Combine the predictions of the branches, `neg + s · (pos − neg)`; a single branch is returned unchanged.

    Args:
        prediction: `[num_branches·B, ...]`, stacked.
        guidance: s, the guidance scale of every image, `[B]`.
        num_branches: 1 or 2.

    Returns:
        `[B, ...]` in the wider of the two dtypes.
    """
    if num_branches == 1:
        return prediction
    dtype = torch.promote_types(prediction.dtype, guidance.dtype)
    negative, positive = split(prediction.to(dtype), num_branches)
    scale = guidance.to(dtype).reshape(-1, *[1] * (prediction.dim() - 1))  # [B, 1, ...]
    return negative + scale * (positive - negative)


def guidance_at(scale: GuidanceScale, noise_level: torch.Tensor) -> torch.Tensor:
    """Return `low + (high − low) · curve(r)`, `[B]`, for noise levels r in [0, 1], float32 `[B]`."""
    return scale.low + (scale.high - scale.low) * _CURVES[scale.curve](noise_level)
