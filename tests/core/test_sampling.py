"""Sampling: the combination of the branches, noise by seed, and schedulers that draw noise themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dreamartist_pipeline.core.sampling import KnownLatents, image_generators, initial_noise, sample_latents


class HalvingScheduler:
    """Subtracts half of the prediction at every step; remembers what it was given."""

    init_noise_sigma = 2.0

    def __init__(self) -> None:
        self.predictions: list[torch.Tensor] = []

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        self.timesteps = torch.arange(num_inference_steps, 0, -1, device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample / 4

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> SimpleNamespace:
        self.predictions.append(model_output)
        return SimpleNamespace(prev_sample=sample - model_output / 2)


class NoisyScheduler(HalvingScheduler):
    """Adds noise of one generator per image."""

    def step(  # type: ignore[override]
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: list[torch.Generator] | None = None,
    ) -> SimpleNamespace:
        assert generator is not None
        noise = torch.stack([torch.randn(sample.shape[1:], generator=g) for g in generator])
        return SimpleNamespace(prev_sample=sample + noise)


def branch_constants(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Predict 1 in the negative rows and 2 in the positive rows."""
    rows = len(latents) // 2
    return torch.cat([torch.full_like(latents[:rows], 1.0), torch.full_like(latents[rows:], 2.0)])


def test_predictions_are_combined_by_the_guidance_scale() -> None:
    scheduler = HalvingScheduler()
    result = sample_latents(branch_constants, scheduler, torch.ones(2, 1, 1, 1), 3.0, 2)
    assert [p.flatten().tolist() for p in scheduler.predictions] == [[4.0, 4.0]] * 2  # 1 + 3 · (2 − 1)
    assert result.flatten().tolist() == [-2.0, -2.0]  # 1 · 2 − 4/2 − 4/2


def test_guidance_scale_one_is_the_positive_branch() -> None:
    scheduler = HalvingScheduler()
    sample_latents(branch_constants, scheduler, torch.ones(1, 1, 1, 1), 1.0, 1)
    assert scheduler.predictions[0].item() == 2.0


def test_both_branches_see_the_same_scaled_latents_and_timesteps() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append((latents, timesteps))
        return torch.zeros_like(latents)

    noise = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    sample_latents(denoise, HalvingScheduler(), noise, 3.0, 1)
    assert seen[0][0].flatten().tolist() == [0.5, 1.5, 0.5, 1.5]  # · init_noise_sigma 2 / 4
    assert seen[0][1].tolist() == [1, 1, 1, 1]


def test_progress_counts_the_steps() -> None:
    steps: list[int] = []
    sample_latents(branch_constants, HalvingScheduler(), torch.ones(1, 1, 1, 1), 1.0, 3, steps.append)
    assert steps == [1, 2, 3]


def test_noise_depends_on_the_own_seed_only() -> None:
    together, alone = (initial_noise((4, 2, 2), image_generators(seeds)) for seeds in ([7, 8], [8]))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_a_scheduler_that_draws_noise_gets_one_generator_per_image() -> None:
    def run(seeds: list[int]) -> torch.Tensor:
        generators = image_generators(seeds)
        noise = initial_noise((1, 2, 2), generators)
        return sample_latents(branch_constants, NoisyScheduler(), noise, 1.0, 2, generators=generators)

    torch.testing.assert_close(run([1, 2])[1], run([2])[0])
    assert run([1, 2])[0].flatten().tolist() != pytest.approx(run([1, 2])[1].flatten().tolist())


# --------------------------------------------------------------------------------------------- from a picture


class NoisingScheduler(HalvingScheduler):
    """Noise of timestep t is t times the noise; two predictions a step, as Heun's."""

    order = 2
    begin_index = None

    def set_begin_index(self, begin_index: int) -> None:
        self.begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        self.timesteps = torch.arange(2 * num_inference_steps, 0, -1, device=device)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return original_samples + timesteps.view(-1, 1, 1, 1) * noise

    def step(  # type: ignore[override]
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> SimpleNamespace:
        return SimpleNamespace(prev_sample=sample - 1)


def from_picture(
    denoise: float, mask: torch.Tensor | None, num_steps: int = 4
) -> tuple[torch.Tensor, NoisingScheduler]:
    scheduler = NoisingScheduler()
    known = KnownLatents(torch.full((1, 1, 1, 2), 100.0), denoise, mask)
    noise = torch.ones(1, 1, 1, 2)
    return sample_latents(branch_constants, scheduler, noise, 1.0, num_steps, known=known), scheduler


def test_a_picture_is_noised_to_the_first_timestep_that_is_left() -> None:
    latents, scheduler = from_picture(0.5, None)
    assert scheduler.begin_index == 4  # 2 of 4 steps are left out, each of two predictions
    assert latents.flatten().tolist() == [100.0] * 2  # 100 + 4 · 1, then 4 predictions of − 1


def test_the_share_of_steps_is_rounded_down() -> None:
    assert from_picture(0.74, None)[1].begin_index == 4


def test_a_picture_alone_is_noised_even_when_every_step_is_taken() -> None:
    latents, scheduler = from_picture(1.0, None)
    assert scheduler.begin_index == 0
    assert latents.flatten().tolist() == [100.0] * 2  # 100 + 8 · 1 − 8


def test_a_masked_picture_starts_from_pure_noise_when_every_step_is_taken() -> None:
    latents, _ = from_picture(1.0, torch.tensor([[[[1.0, 0.0]]]]))
    assert latents.flatten().tolist() == [2.0 - 8, 100.0]  # noise · init_noise_sigma − 8; what is kept comes back


def test_what_is_kept_has_the_noise_of_the_next_prediction() -> None:
    seen: list[float] = []

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(4 * latents[0, 0, 0, 1].item())  # scale_model_input divides by 4
        return torch.zeros_like(latents)

    known = KnownLatents(torch.full((1, 1, 1, 2), 100.0), 0.5, torch.tensor([[[[1.0, 0.0]]]]))
    sample_latents(denoise, NoisingScheduler(), torch.ones(1, 1, 1, 2), 1.0, 4, known=known)
    assert seen == [104.0, 103.0, 102.0, 101.0]
