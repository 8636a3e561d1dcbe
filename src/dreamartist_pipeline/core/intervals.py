"""Means with bootstrap intervals: of a list of values, and of prompts × seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

CONFIDENCE = 0.95
NUM_RESAMPLES = 2_000

Statistic = Literal["mean", "max"]


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; both ends are NaN where there is nothing to resample."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """How often each prompt and each seed is in each resample.

    Attributes:
        prompts: float64 `[R, P]`.
        seeds: float64 `[R, S]`.
    """

    prompts: torch.Tensor
    seeds: torch.Tensor

    @classmethod
    def draw(cls, num_prompts: int, num_seeds: int, seed: int, num_resamples: int) -> Resampled:
        """Draw prompts and seeds with replacement, independently of each other."""
        generator = torch.Generator().manual_seed(seed)
        return cls(*(_counts(size, num_resamples, generator) for size in (num_prompts, num_seeds)))

    @classmethod
    def all_once(cls, num_prompts: int, num_seeds: int) -> Resampled:
        """Return one resample: the sample itself."""
        return cls(torch.ones(1, num_prompts).double(), torch.ones(1, num_seeds).double())


def _counts(size: int, num_resamples: int, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.randint(size, (num_resamples, size), generator=generator)
    return torch.zeros(num_resamples, size).double().scatter_add_(1, chosen, torch.ones_like(chosen).double())


def bootstrap_mean(
    values: Sequence[float], seed: int = 0, num_resamples: int = 10_000, confidence: float = CONFIDENCE
) -> Estimate:
    """Return the mean of `values` and its percentile bootstrap interval (Efron 1979).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("expected at least one value; got none")
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = sample[torch.randint(len(sample), (num_resamples, len(sample)), generator=generator)].mean(dim=1)
    return Estimate(float(sample.mean()), *_percentiles(means, confidence))


def bootstrap_grid(
    values: torch.Tensor, statistic: Statistic = "mean", seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Return the mean or maximum over prompts × seeds, with its 95 % interval.

    Prompts and seeds are resampled independently of each other (the pigeonhole bootstrap, Owen 2007), because images of
    one prompt are alike, and images of one seed are, too. The interval is that of the percentiles.

    Args:
        values: `[P, S]`; NaN where an image has no value.
        statistic: of the values of a resample.
        seed: of the resampling.
        num_resamples: number of resamples.

    Raises:
        ValueError: no value is a number.
    """
    known = ~values.isnan()
    if not known.any():
        raise ValueError("expected at least one value; got none")
    data = values.double().nan_to_num()

    def of(chosen: Resampled) -> torch.Tensor:
        if statistic == "max":
            drawn = (chosen.prompts[:, :, None] > 0) & (chosen.seeds[:, None, :] > 0) & known  # [R, P, S]
            return data.where(drawn, -torch.inf).amax(dim=(1, 2)).where(drawn.any(dim=2).any(dim=1), torch.nan)
        return _weighted(data, chosen) / _weighted(known.double(), chosen)

    return _estimate(of, values.shape[0], values.shape[1], seed, num_resamples)


def bootstrap_pairs(distances: torch.Tensor, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Estimate:
    """Return the mean distance of two seeds' images of one prompt, with its 95 % interval; see `bootstrap_grid`.

    A seed that a resample holds several times is not compared with itself.

    Args:
        distances: `[P, S, S]`, symmetric.
        seed: of the resampling.
        num_resamples: number of resamples.

    Raises:
        ValueError: there are fewer than two seeds.
    """
    num_prompts, num_seeds, _ = distances.shape
    if num_seeds < 2:
        raise ValueError(f"expected at least 2 seeds, got {num_seeds}")
    apart = 1 - torch.eye(num_seeds).double()
    data = distances.double() * apart

    def of(chosen: Resampled) -> torch.Tensor:
        pairs = chosen.seeds[:, :, None] * chosen.seeds[:, None, :]  # [R, S, S]
        total = torch.einsum("rp,pst,rst->r", chosen.prompts, data, pairs)
        return total / (num_prompts * torch.einsum("st,rst->r", apart, pairs))

    return _estimate(of, num_prompts, num_seeds, seed, num_resamples)


def _weighted(values: torch.Tensor, chosen: Resampled) -> torch.Tensor:
    return torch.einsum("rp,ps,rs->r", chosen.prompts, values, chosen.seeds)


def _estimate(
    statistic: Callable[[Resampled], torch.Tensor], num_prompts: int, num_seeds: int, seed: int, num_resamples: int
) -> Estimate:
    value = float(statistic(Resampled.all_once(num_prompts, num_seeds)))
    if num_prompts * num_seeds == 1:
        return Estimate(value, torch.nan, torch.nan)
    resamples = statistic(Resampled.draw(num_prompts, num_seeds, seed, num_resamples))
    return Estimate(value, *_percentiles(resamples[~resamples.isnan()], CONFIDENCE))


def _percentiles(values: torch.Tensor, confidence: float) -> tuple[float, float]:
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = values.quantile(tails).tolist()
    return low, high
