"""Bootstrap intervals: values derived by hand first."""

from __future__ import annotations

import math

import pytest
import torch

from dreamartist_pipeline.core.intervals import Estimate, bootstrap_grid, bootstrap_mean, bootstrap_pairs


def test_the_interval_of_equal_values_is_their_mean() -> None:
    estimate = bootstrap_mean([0.25] * 6)
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


def test_the_interval_of_five_ones_and_five_zeros_is_that_of_ten_fair_coins() -> None:
    """Resampled means are Binomial(10, 1/2) / 10: P(≤ 1) = 0.011 and P(≤ 2) = 0.055 put the 2.5 % quantile at 0.2."""
    estimate = bootstrap_mean([1.0, 0.0] * 5)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.5, 0.2, 0.8))


def test_the_interval_narrows_with_less_confidence() -> None:
    values = [0.1, 0.4, 0.35, 0.8, 0.6, 0.2]
    wide, narrow = bootstrap_mean(values, seed=3), bootstrap_mean(values, seed=3, confidence=0.5)
    assert wide.low < narrow.low < wide.mean < narrow.high < wide.high


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = [0.1, 0.4, 0.35, 0.8, 0.6, 0.2]
    first, again, other = (bootstrap_mean(values, seed=seed, num_resamples=20) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="none"):
        bootstrap_mean([])


def test_a_grid_of_equal_values_has_no_width() -> None:
    assert bootstrap_grid(torch.full((3, 4), 0.25)) == Estimate(0.25, 0.25, 0.25)


def test_a_single_image_has_no_interval() -> None:
    estimate = bootstrap_grid(torch.tensor([[0.5]]))
    assert estimate.mean == 0.5
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_images_of_one_prompt_are_not_independent() -> None:
    """Ten prompts, five of ones and five of zeros: whatever the number of seeds, the interval is that of ten values."""
    by_prompt = torch.tensor([1.0, 0.0] * 5)[:, None]
    for num_seeds in (1, 20):
        estimate = bootstrap_grid(by_prompt.expand(10, num_seeds))
        assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.5, 0.2, 0.8))
        assert bootstrap_grid(by_prompt.T.expand(num_seeds, 10)) == pytest.approx(estimate, abs=0.1)


def test_the_variance_of_the_mean_is_the_sum_of_that_of_prompts_and_of_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts, seeds = torch.randn(30, 1, generator=generator), torch.randn(1, 20, generator=generator)
    both = bootstrap_grid(prompts + seeds, num_resamples=20_000)
    deviation = (prompts.var(correction=0) / 30 + seeds.var(correction=0) / 20).sqrt().item()
    assert (both.high - both.low) / 2 == pytest.approx(1.96 * deviation, rel=0.05)


def test_images_without_a_value_do_not_count() -> None:
    values = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [0.0, 1.0]])
    estimate = bootstrap_grid(values)
    assert estimate.mean == pytest.approx(2 / 3)
    assert 0 <= estimate.low < estimate.high <= 1
    with pytest.raises(ValueError, match="none"):
        bootstrap_grid(values * torch.nan)


def test_the_maximum_of_a_resample_is_at_most_that_of_all() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    estimate = bootstrap_grid(values, "max")
    assert estimate.mean == estimate.high == 11
    assert estimate.low < 11


def test_the_grids_interval_depends_on_the_seed_alone() -> None:
    values = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    first, again, other = (bootstrap_grid(values, seed=seed, num_resamples=50) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_pairs_are_of_different_seeds_also_where_a_resample_repeats_one() -> None:
    equal = torch.full((2, 3, 3), 0.5)
    assert bootstrap_pairs(equal) == Estimate(0.5, 0.5, 0.5)
    distances = torch.tensor([[[9.0, 0.2], [0.2, 9.0]], [[9.0, 0.4], [0.4, 9.0]]])  # two seeds, of one distance
    estimate = bootstrap_pairs(distances)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.3, 0.2, 0.4))
    with pytest.raises(ValueError, match="2 seeds, got 1"):
        bootstrap_pairs(torch.zeros(2, 1, 1))
