from __future__ import annotations

import pytest
import torch

from dreamartist_pipeline.core.losses import image_error, masked_huber, masked_mse, snr_weight
from dreamartist_pipeline.errors import InputError
from refusals import says

SNR = torch.tensor([0.0, 1.0, 2.0, 8.0])


@pytest.mark.parametrize(
    ("weighting", "prediction_type", "expected"),
    [
        ("none", "epsilon", [1, 1, 1, 1]),
        ("none", "v_prediction", [1, 1, 1, 1]),
        ("min_snr", "epsilon", [1, 1, 1, 2 / 8]),
        ("min_snr", "v_prediction", [0, 1 / 2, 2 / 3, 2 / 9]),
        ("soft_min_snr", "epsilon", [1, 8 / 9, 8 / 12, 8 / 72]),
        ("soft_min_snr", "v_prediction", [0, 8 / 9 * 1 / 2, 8 / 12 * 2 / 3, 8 / 72 * 8 / 9]),
    ],
)
def test_weights_for_gamma_two(weighting: str, prediction_type: str, expected: list[float]) -> None:
    torch.testing.assert_close(snr_weight(weighting, SNR, 2.0, prediction_type), torch.tensor(expected).float())


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="none, min_snr, soft_min_snr", got="'min_snrr'")):
        snr_weight("min_snrr", SNR, 2.0, "epsilon")


def test_each_row_is_the_mean_of_weight_times_mask_times_squared_error() -> None:
    prediction = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[1.0, 1.0]], [[1.0, 1.0]]]])  # [2, 2, 1, 2]
    mask = torch.tensor([[[[0.0, 5.0]]], [[[1.0, 1.0]]]])  # one mask for both channels
    loss = masked_mse(prediction, torch.zeros_like(prediction), torch.tensor([0.5, 3.0]), mask)
    assert loss.tolist() == [0.5 * 5 * (4 + 16) / 4, 3.0]


def test_without_a_mask_every_pixel_counts_once() -> None:
    prediction, target = torch.randn(2, 3, 4, 5, 5)
    weight = torch.ones(3)
    whole = masked_mse(prediction, target, weight, torch.ones(3, 1, 5, 5))
    assert torch.equal(masked_mse(prediction, target, weight, None), whole)


def test_the_loss_is_float32_whatever_the_prediction_is() -> None:
    prediction = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)  # squared, it overflows float16
    loss = masked_mse(prediction, torch.zeros_like(prediction), torch.ones(1), None)
    assert loss.dtype == torch.float32
    assert loss.item() == 90_000


def test_a_shape_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\), got \(1, 4, 8, 8\)"):
        masked_mse(torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.ones(2), None)


def test_the_huber_loss_is_squared_near_zero_and_linear_far_away() -> None:
    prediction = torch.tensor([1e-4, 0.75, 1000.0]).view(3, 1, 1, 1)
    loss = masked_huber(prediction, torch.zeros(3, 1, 1, 1), torch.ones(3), None, delta=1.0)
    # 2 · (√(0.5625 + 1) − 1) = 2 · (1.25 − 1) = 0.5; far away 2δ(|e| − δ)
    torch.testing.assert_close(loss, torch.tensor([1e-8, 0.5, 2 * 999.0]), rtol=1e-3, atol=0)


def test_the_huber_loss_takes_weight_mask_and_delta() -> None:
    prediction = torch.tensor([[[[3.0, 4.0]]]])
    loss = masked_huber(
        prediction, torch.zeros_like(prediction), torch.tensor([0.5]), torch.tensor([[[[0.0, 5.0]]]]), 3.0
    )
    assert loss.item() == pytest.approx(0.5 * 5 * (2 * 3 * (5 - 3)) / 2)  # √(16 + 9) = 5


@pytest.mark.parametrize(("norm", "expected"), [("l1", (2 * 1 + 0 * 3) / 2), ("l2", (2 * 1 + 0 * 9) / 2)])
def test_decoded_images_are_compared_under_the_mask_of_their_latents(norm: str, expected: float) -> None:
    decoded = torch.tensor([1.0, 1.0, -3.0, -3.0]).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    mask = torch.tensor([[[[2.0, 0.0]]]])  # one latent is two pixels wide and high
    assert image_error(decoded, torch.zeros(1, 3, 2, 4), mask, norm).tolist() == [expected]


def test_an_unknown_norm_of_images_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="l1, l2", got="'l3'")):
        image_error(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), None, "l3")
