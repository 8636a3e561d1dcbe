"""Token weights: passed along with the ids, and their effect on text states, by hand-derived values."""

from __future__ import annotations

import pytest
import torch

from dreamartist_pipeline.core.prompt_tokens import PromptTokens, by_branch, concatenate, weight_states


def test_the_mean_of_the_prompt_is_restored() -> None:
    states = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])  # mean 2
    weighted = weight_states(states, torch.tensor([[1.0, 2.0]]))  # 1, 3, 4, 4: mean 3
    torch.testing.assert_close(weighted, torch.tensor([[[1.0, 3.0], [4.0, 4.0]]]) * 2 / 3)


def test_every_prompt_has_its_own_mean() -> None:
    states = torch.tensor([[[1.0], [3.0]], [[10.0], [30.0]]])
    weighted = weight_states(states, torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    torch.testing.assert_close(weighted, torch.tensor([[[1.0], [3.0]], [[20.0], [20.0]]]))


@pytest.mark.parametrize(
    "states",
    [
        [[1.0, -1.0], [2.0, -2.0]],  # no mean at all
        [[1.0, -1.0], [2.0, -2.0000001]],  # rounding
        [[4.0, 0.0], [-2.0, -1.0]],  # 0.25, which the weight turns into −0.5
    ],
)
def test_a_mean_that_is_rounding_or_turns_around_is_left_alone(states: list[list[float]]) -> None:
    plain, weights = torch.tensor([states]), torch.tensor([[1.0, 2.0]])
    assert torch.equal(weight_states(plain, weights), plain * weights[..., None])


def test_weights_of_one_change_no_bit() -> None:
    states = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight_states(states, torch.ones(2, 5)), states)
    assert weight_states(states.bfloat16(), torch.ones(2, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_are_those_of_the_formula(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 3, 4, generator=generator, dtype=torch.float32)
    states = (states - states.mean() + offset).requires_grad_()
    weights = torch.tensor([[1.0, 1.5, 1.0]])
    weight_states(states, weights).square().sum().backward()
    plain = states.detach().clone().requires_grad_()
    weighted = plain * weights[..., None]
    (weighted * (plain.mean() / weighted.mean() if offset else 1)).square().sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, plain.grad)


def test_tokens_without_weights_count_once_beside_weighted_ones() -> None:
    plain = PromptTokens(torch.tensor([[1, 2]]))
    weighted = PromptTokens(torch.tensor([[3, 4]]), torch.tensor([[1.0, 1.5]]))
    both = concatenate([plain, weighted])
    assert both.weights is not None and both.weights.tolist() == [[1.0, 1.0], [1.0, 1.5]]
    assert concatenate([plain, plain]).weights is None
    paired = by_branch([plain, weighted])
    assert paired.weights is not None
    assert paired.ids.tolist() == [[[1, 2], [3, 4]]]
    assert paired.weights.tolist() == [[[1.0, 1.0], [1.0, 1.5]]]


def test_branches_are_stacked_one_after_the_other() -> None:
    ids = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])  # [P, nb, L]
    rows = PromptTokens(ids, ids / 2).branches_in_rows()
    assert rows.ids.tolist() == [[1, 2], [5, 6], [3, 4], [7, 8]]
    assert rows.weights is not None and torch.equal(rows.weights, rows.ids / 2)
