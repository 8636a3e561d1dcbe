from __future__ import annotations

import pytest
import torch

from dreamartist_pipeline.core.diffusion import NoiseSchedule, timestep_range
from dreamartist_pipeline.errors import InputError
from refusals import says

ALPHAS = torch.tensor([0.96, 0.64, 0.36])  # √ᾱ = 0.98, 0.8, 0.6; √(1 − ᾱ) = 0.2, 0.6, 0.8


def test_noisy_latents_mix_signal_and_noise_by_the_timestep() -> None:
    latents, noise = torch.full((2, 1, 1, 1), 10.0), torch.full((2, 1, 1, 1), 5.0)
    noisy = NoiseSchedule(ALPHAS, "epsilon").add_noise(latents, noise, torch.tensor([1, 2]))
    torch.testing.assert_close(noisy.flatten(), torch.tensor([0.8 * 10 + 0.6 * 5, 0.6 * 10 + 0.8 * 5]))


def test_the_ratio_of_signal_to_noise_is_that_of_the_variances() -> None:
    snr = NoiseSchedule(ALPHAS, "epsilon").snr(torch.tensor([0, 1, 2]))
    torch.testing.assert_close(snr, torch.tensor([24.0, 16 / 9, 9 / 16]))


def test_epsilon_models_predict_the_noise() -> None:
    noise = torch.randn(2, 4, 3, 3)
    assert torch.equal(
        NoiseSchedule(ALPHAS, "epsilon").target(torch.randn(2, 4, 3, 3), noise, torch.tensor([0, 1])), noise
    )


def test_v_models_predict_noise_minus_signal() -> None:
    latents, noise = torch.full((2, 1, 1, 1), 10.0), torch.full((2, 1, 1, 1), 5.0)
    target = NoiseSchedule(ALPHAS, "v_prediction").target(latents, noise, torch.tensor([1, 2]))
    torch.testing.assert_close(target.flatten(), torch.tensor([0.8 * 5 - 0.6 * 10, 0.6 * 5 - 0.8 * 10]))


def test_latents_and_noise_follow_from_the_noisy_latents_and_v() -> None:
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 50, dtype=torch.float64), "v_prediction")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64, generator=generator)
    timesteps = torch.randint(50, (5,), generator=generator)
    noisy, v = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
    alpha = schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * noisy - (1 - alpha).sqrt() * v, latents, rtol=0, atol=1e-12)
    torch.testing.assert_close((1 - alpha).sqrt() * noisy + alpha.sqrt() * v, noise, rtol=0, atol=1e-12)


def test_noising_keeps_the_dtype_and_the_inputs() -> None:
    latents, noise = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    assert NoiseSchedule(ALPHAS, "epsilon").add_noise(latents, noise, torch.tensor([2])).dtype == torch.bfloat16
    assert latents.item() == noise.item() == 1


def test_the_number_of_timesteps_is_the_length_of_the_schedule() -> None:
    assert NoiseSchedule(ALPHAS, "epsilon").num_train_timesteps == 3


def test_other_prediction_types_are_refused() -> None:
    with pytest.raises(InputError, check=says(expected="epsilon or v_prediction", got="'sample'")):
        NoiseSchedule(ALPHAS, "sample")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_the_latents_back(prediction_type: str) -> None:
    schedule = NoiseSchedule(ALPHAS, prediction_type)
    latents, noise, timesteps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.arange(3)
    noisy, target = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
    torch.testing.assert_close(schedule.predicted_latents(noisy, target, timesteps), latents, atol=1e-5, rtol=0)


def test_predicted_latents_by_hand() -> None:
    noisy, prediction, timestep = torch.full((1, 1, 1, 1), 8.0), torch.full((1, 1, 1, 1), 5.0), torch.tensor([1])
    from_noise = NoiseSchedule(ALPHAS, "epsilon").predicted_latents(noisy, prediction, timestep)
    assert from_noise.item() == pytest.approx((8 - 0.6 * 5) / 0.8)
    from_v = NoiseSchedule(ALPHAS, "v_prediction").predicted_latents(noisy, prediction, timestep)
    assert from_v.item() == pytest.approx(0.8 * 8 - 0.6 * 5)


def test_a_zero_terminal_schedule_shifts_and_scales_the_signal() -> None:
    schedule = NoiseSchedule(torch.tensor([0.81, 0.36, 0.09]), "v_prediction").with_zero_terminal_snr()
    # √ᾱ = 0.9, 0.6, 0.3, less 0.3 = 0.6, 0.3, 0, times 0.9 / 0.6 = 0.9, 0.45, 0
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.81, 0.2025, 0.0]))
    assert schedule.snr(torch.tensor([2])).item() == 0


def test_a_zero_terminal_schedule_needs_v_prediction() -> None:
    with pytest.raises(InputError, check=says(expected="training.zero_terminal_snr", got="'epsilon'")):
        NoiseSchedule(ALPHAS, "epsilon").with_zero_terminal_snr()


@pytest.mark.parametrize(
    ("limits", "expected"), [((0.0, 1.0), (0, 1000)), ((0.29, 0.7), (290, 700)), ((0.999, 1.0), (999, 1000))]
)
def test_limits_of_timesteps_are_fractions_of_all(limits: tuple[float, float], expected: tuple[int, int]) -> None:
    assert timestep_range(limits, 1000) == expected


def test_limits_that_hold_no_timestep_are_refused() -> None:
    with pytest.raises(InputError, check=says(expected="training.timesteps", got="[0.5, 0.51]")):
        timestep_range((0.5, 0.51), 20)
