from __future__ import annotations

import math

import pytest
import torch

from dreamartist_pipeline.core.branches import (
    NEGATIVE,
    POSITIVE,
    branches,
    combine,
    guidance_at,
    repeat,
    split,
    stack,
)
from dreamartist_pipeline.params import GuidanceScale


def test_the_negative_branch_comes_first() -> None:
    stacked = stack(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
    assert stacked.tolist() == [[1.0], [2.0], [3.0], [4.0]]
    assert split(stacked, 2)[NEGATIVE].tolist() == [[1.0], [2.0]]
    assert split(stacked, 2)[POSITIVE].tolist() == [[3.0], [4.0]]


def test_repeating_then_splitting_gives_every_branch_the_same_rows() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    assert all(torch.equal(part, x) for part in split(repeat(x, 2), 2))
    assert torch.equal(repeat(x, 1), x)


def test_a_number_of_rows_that_is_no_multiple_of_the_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows, got 3"):
        split(torch.zeros(3, 1), 2)


def test_one_branch_is_the_positive_one() -> None:
    assert branches(1) == (POSITIVE,)
    assert branches(2) == (NEGATIVE, POSITIVE)
    with pytest.raises(ValueError, match="got 3"):
        branches(3)


def test_combining_moves_from_negative_past_positive() -> None:
    prediction = torch.tensor([1.0, 10.0, 2.0, 30.0]).reshape(4, 1, 1, 1)  # negative rows 1, 10; positive rows 2, 30
    combined = combine(prediction, torch.tensor([3.0, 0.5]), 2)
    assert combined.flatten().tolist() == [1 + 3 * (2 - 1), 10 + 0.5 * (30 - 10)]


def test_guidance_scale_one_equals_the_positive_branch() -> None:
    prediction = torch.randn(6, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    combined = combine(prediction, torch.ones(3), 2)
    torch.testing.assert_close(combined, split(prediction, 2)[POSITIVE], rtol=0, atol=1e-14)


def test_one_branch_is_returned_as_it_is() -> None:
    prediction = torch.randn(3, 4, 2, 2)
    assert combine(prediction, torch.full((3,), 7.0), 1) is prediction


def test_half_precision_predictions_are_combined_in_the_dtype_of_the_scale() -> None:
    combined = combine(torch.ones(2, 1, 1, 1, dtype=torch.bfloat16), torch.tensor([3.0]), 2)
    assert combined.dtype == torch.float32


def test_gradients_of_the_combination_are_one_minus_s_and_s() -> None:
    prediction = torch.zeros(2, 1, requires_grad=True)
    combine(prediction, torch.tensor([3.0]), 2).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [-2.0, 3.0]


def test_a_constant_scale_is_the_same_at_every_timestep() -> None:
    scale = guidance_at(GuidanceScale.model_validate("3.0"), torch.tensor([0, 0.5, 1]))
    assert scale.dtype == torch.float32
    assert scale.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("text", "middle"),
    [
        ("1.5-4.5", 1.5 + 3 * 0.5),
        ("1.5-4.5:ln", 1.5 + 3 * 0.5),
        ("1.5-4.5:cos", 1.5 + 3 * math.sqrt(0.5)),  # cos(−π/4)
        ("1.5-4.5:cos2", 1.5 + 3 * (1 - math.sqrt(0.5))),  # 1 − cos(π/4)
    ],
)
def test_high_noise_gets_the_upper_scale(text: str, middle: float) -> None:
    scale = guidance_at(GuidanceScale.model_validate(text), torch.tensor([0, 0.5, 1]))
    torch.testing.assert_close(scale, torch.tensor([1.5, middle, 4.5]))


_ROOT_HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.0-3.0", (1, 2, 3)),
        ("1.0-3.0:ln", (1, 2, 3)),
        ("1.0-3.0:cos", (1, 1 + 2 * _ROOT_HALF, 3)),
        ("1.0-3.0:cos2", (1, 3 - 2 * _ROOT_HALF, 3)),
        ("3.0-1.0", (3, 2, 1)),
        ("3.0-1.0:cos", (3, 3 - 2 * _ROOT_HALF, 1)),
        ("3.0-1.0:cos2", (3, 1 + 2 * _ROOT_HALF, 1)),
        ("2-2:cos", (2, 2, 2)),
    ],
)
def test_a_scale_runs_between_its_ends_in_either_direction(text: str, expected: tuple[float, ...]) -> None:
    scale = GuidanceScale.model_validate(text)
    torch.testing.assert_close(guidance_at(scale, torch.tensor([0, 0.5, 1])), torch.tensor(expected).float())
    assert scale.num_branches == 2


@pytest.mark.parametrize("curve", ["ln", "cos", "cos2"])
def test_a_curve_never_leaves_its_ends(curve: str) -> None:
    scale = guidance_at(GuidanceScale.model_validate(f"1.0-3.0:{curve}"), torch.linspace(0, 1, 1000))
    assert scale.min().item() == pytest.approx(1, abs=1e-6)
    assert scale.max().item() == pytest.approx(3, abs=1e-6)
    assert bool((scale.diff() >= -1e-6).all())
