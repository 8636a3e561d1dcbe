"""The pretraining loop: schedules, resuming, latent normalisation."""

from __future__ import annotations

import copy
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from dreamartist_pipeline.checkpoint_files import CheckpointStore
from dreamartist_pipeline.core.checkpoints import stop_requests
from dreamartist_pipeline.core.tracking import NoTracker
from dreamartist_pipeline.embedded import pretraining
from dreamartist_pipeline.embedded.pretraining import (
    Muon,
    Plan,
    StageReporter,
    StepReport,
    denoiser_loss,
    draw_timesteps,
    fit_stage,
    hidden_matrices,
    normalize_latents,
    orthogonalized,
    plan_of,
    psnr,
    run_stage,
    warmup_stable_decay,
)
from dreamartist_pipeline.errors import StoppedEarly
from dreamartist_pipeline.params import StageParams

SEED = 0


def settings(num_steps: int = 6, **changes: object) -> StageParams:
    values = {"batch_size": 4, "lr": 0.1, "warmup_steps": 1, "ema_decay": 0.5, "checkpoint_minutes": 0.0}
    return StageParams(num_steps=num_steps, **{**values, **changes})


def run(weight: nn.Parameter, **kwargs: object) -> list[dict]:
    saved: list[dict] = []

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        return (weight - torch.randn(3, generator=generator)).pow(2).mean()

    keep = lambda state: saved.append(copy.deepcopy(state))  # noqa: E731
    fit_stage([weight], loss_of, settings(), SEED, save_checkpoint=keep, **kwargs)
    return saved


class RecordingBarAndTracker:
    def __init__(self) -> None:
        self.num_updates, self.shown, self.tracked, self.total = 0, [], {}, None

    def update(self) -> None:
        self.num_updates += 1

    def set_postfix(self, **values: str) -> None:
        self.shown.append(values)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.tracked[step] = metrics


def test_the_mean_loss_is_reported_every_25_steps_and_at_the_end():
    seen = RecordingBarAndTracker()
    report = StageReporter("towers", 64, seen, seen)
    for step in range(11, 41):  # resumed after ten steps
        report(StepReport(step, 40, loss=float(step), lr=1e-3, grad_norm=2.0, seconds=0.5))
    assert seen.num_updates == 30
    assert [shown["loss"] for shown in seen.shown] == ["18.0000", "33.0000"]  # the means of 11 to 25, 26 to 40
    assert list(seen.tracked) == [25, 40]
    assert seen.tracked[25] == {
        "towers/loss": 18.0,
        "towers/lr": 1e-3,
        "towers/grad_norm": 2.0,
        "towers/samples": 25 * 64,
        "towers/samples_per_s": 128.0,
        "towers/done": 25 / 40,
        "towers/hours_to_go": 15 * 0.5 / 3600,
    }
    assert seen.total == 40


def test_a_resumed_run_ends_in_the_same_weights_as_an_uninterrupted_one():
    whole, resumed = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    saved = run(whole)
    assert [state["step"] for state in saved] == [1, 2, 3, 4, 5, 6]
    run(resumed, checkpoint=saved[1])
    assert torch.equal(whole, resumed)


def test_a_resumed_run_of_matrices_ends_in_the_same_weights_too():
    def run_matrix(matrix: nn.Parameter, checkpoint: dict | None = None) -> list[dict]:
        saved: list[dict] = []
        fit_stage(
            [matrix],
            lambda generator: (matrix - torch.randn(16, 16, generator=generator)).pow(2).mean(),
            settings(matrix_lr=0.1),
            SEED,
            matrices=[matrix],
            checkpoint=checkpoint,
            save_checkpoint=lambda state: saved.append(copy.deepcopy(state)),
        )
        return saved

    whole, resumed = nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16, 16))
    run_matrix(resumed, run_matrix(whole)[0])
    assert torch.equal(whole, resumed)


def test_hidden_matrices_are_wide_kernels_and_linear_weights():
    kernel, linear = nn.Conv2d(16, 16, 3), nn.Linear(32, 16)
    others = nn.ModuleList([nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 3), nn.Embedding(32, 16), nn.GroupNorm(1, 16)])
    found = hidden_matrices(nn.ModuleList([kernel, linear]), others)
    assert [id(weight) for weight in found] == [id(kernel.weight), id(linear.weight)]


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_orthogonalizing_keeps_directions_and_makes_singular_values_roughly_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    (result,) = orthogonalized(matrix[None])
    values = (left.T @ result @ right.T).diagonal()
    assert ((values > 0.6) & (values < 1.3)).all()
    assert torch.allclose(left * values @ right, result, atol=1e-4)


def test_muon_steps_by_an_orthogonal_matrix_of_the_size_of_adams_update():
    kernel = nn.Parameter(torch.zeros(16, 4, 2, 2))
    kernel.grad = torch.randn(16, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    gradient = kernel.grad.reshape(16, 16)
    Muon([kernel], lr=0.5, momentum=0.0).step()
    expected = -0.5 * 0.2 * 4 * orthogonalized(gradient[None])[0]
    assert torch.allclose(kernel.detach().reshape(16, 16), expected, atol=1e-6)


def test_muon_learns_a_matrix():
    target = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    matrix = nn.Parameter(torch.zeros(16, 16))
    optimizer = Muon([matrix], lr=0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        matrix.grad = (matrix - target).detach()
        optimizer.step()
    assert (matrix - target).abs().max() < 0.1


def test_training_ends_with_the_moving_average_and_not_the_last_weights():
    weight = nn.Parameter(torch.zeros(3))
    last = run(weight)[-1]["state"]
    assert torch.equal(weight, last["averages"]["values"][0])
    assert not torch.equal(weight, last["parameters"][0])


def test_a_checkpoint_is_saved_with_the_averages_in_place_and_training_continues_without_them():
    weight, seen, saved = nn.Parameter(torch.zeros(3)), [], []

    def save(checkpoint: dict) -> None:
        seen.append(weight.detach().clone())
        saved.append(checkpoint)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        if saved:
            assert torch.equal(weight, saved[-1]["state"]["parameters"][0])
        return (weight - torch.randn(3, generator=generator)).pow(2).mean()

    fit_stage([weight], loss_of, settings(3), SEED, save_checkpoint=save)
    for weights, checkpoint in zip(seen, saved, strict=True):
        assert torch.equal(weights, checkpoint["state"]["averages"]["values"][0])


def test_the_rate_warms_up_stays_and_falls_by_a_root_to_nearly_nothing():
    plan = Plan(num_steps=100, decay_from=80)
    factors = [warmup_stable_decay(step, plan, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[85] == pytest.approx(0.5)  # a quarter of the way: 1 - sqrt(1/4)
    assert factors[99] == pytest.approx(1 - (19 / 20) ** 0.5)


def test_a_stage_ends_with_its_share_of_decay():
    assert plan_of(settings(num_steps=100, decay_share=0.15), None) == Plan(100, 85)


def test_a_longer_training_continues_at_the_constant_rate_where_no_decay_has_begun():
    checkpoint = {"step": 80, "plan": [100, 80]}
    assert plan_of(settings(num_steps=200, decay_share=0.2), checkpoint) == Plan(200, 160)


def test_decay_now_begins_the_decay_at_the_checkpoint():
    checkpoint = {"step": 80, "plan": [1000, 850]}
    assert plan_of(settings(num_steps=1000, decay_share=0.2, decay_now=True), checkpoint) == Plan(100, 80)


@pytest.mark.parametrize("changes", [{"num_steps": 500}, {"decay_now": True}])
def test_a_decay_that_has_begun_keeps_its_plan(changes):
    checkpoint = {"step": 85, "plan": [100, 80]}
    assert plan_of(settings(**{"num_steps": 100, **changes}), checkpoint) == Plan(100, 80)


def test_minutes_size_the_stage_by_its_first_steps(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(pretraining.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(pretraining, "_SIZED_FROM", 2)
    monkeypatch.setattr(pretraining, "_SIZED_AFTER", 4)
    weight, seen = nn.Parameter(torch.zeros(3)), []
    fit_stage([weight], lambda generator: weight.sum(), settings(10**6, minutes=1.0), SEED, on_step=seen.append)
    assert seen[0].num_steps == 10**6
    assert seen[4].num_steps == seen[-1].num_steps == seen[-1].step
    assert 10 < seen[-1].step < 60  # two readings of the clock a step, each a second: about 30 steps a minute


def test_a_stopped_stage_ends_with_a_checkpoint_of_its_last_step():
    weight, saved = nn.Parameter(torch.zeros(3)), []

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return weight.sum()

    seen: list[StepReport] = []
    stage = settings(checkpoint_minutes=60.0)
    with pytest.raises(KeyboardInterrupt, match="step 3"):
        fit_stage([weight], loss_of, stage, SEED, save_checkpoint=saved.append, on_step=seen.append)
    assert [checkpoint["step"] for checkpoint in saved] == [3]


def test_a_stopped_stage_is_continued_from_its_store(tmp_path: Path):
    torch.manual_seed(SEED)
    network, store, saved = nn.Linear(3, 1), CheckpointStore(tmp_path), []
    calls: list[int] = []

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return network(torch.randn(4, 3, generator=generator)).pow(2).mean()

    stage = settings(checkpoint_minutes=60.0)
    arguments = ("towers", [network], loss_of, stage, SEED, store, NoTracker())
    with pytest.raises(StoppedEarly, match="^towers: "):
        run_stage(*arguments, after_save=saved.append)
    run_stage(*arguments, after_save=saved.append)
    assert (saved, len(calls)) == ([2, 6], 6)


def test_signals_outside_the_main_thread_stop_nothing():
    answers: list[bool] = []

    def ask() -> None:
        with stop_requests() as requested:
            answers.append(requested())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]


def test_checkpoints_are_taken_by_the_clock_and_at_the_end(monkeypatch):
    clock = iter(range(0, 10**6, 15))  # two readings a step, half a minute
    monkeypatch.setattr(pretraining.time, "monotonic", lambda: float(next(clock)))
    weight, saved = nn.Parameter(torch.zeros(3)), []
    stage = settings(7, checkpoint_minutes=2.0)
    fit_stage([weight], lambda generator: weight.sum(), stage, SEED, save_checkpoint=saved.append)
    assert [checkpoint["step"] for checkpoint in saved] == [4, 7]


def test_uniform_timesteps_are_everywhere_and_logit_normal_ones_mostly_in_the_middle():
    uniform, normal = (
        draw_timesteps(20_000, 1000, density, torch.Generator().manual_seed(0))
        for density in ("uniform", "logit_normal")
    )
    assert ((uniform >= 250) & (uniform < 750)).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert ((normal >= 250) & (normal < 750)).float().mean().item() == pytest.approx(0.728, abs=0.02)  # P(|x| < ln 3)
    assert normal.min() >= 0 and normal.max() < 1000


def test_psnr_of_an_error_of_a_tenth_of_the_range_is_twenty_db():
    images = torch.zeros(1, 3, 4, 4)
    assert psnr(images + 0.2, images).item() == pytest.approx(20.0, abs=1e-4)  # range 2, error 0.2


def test_normalised_latents_have_zero_mean_and_unit_deviation_and_decode_to_the_same_image():
    from dreamartist_pipeline.embedded.model import build_autoencoder
    from dreamartist_pipeline.params import EmbeddedModelSize

    torch.manual_seed(0)
    size = EmbeddedModelSize(image_px=16, latent_channels=4, autoencoder_channels=(8, 8))
    autoencoder = build_autoencoder(size).eval()
    images = torch.rand(32, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(before.mean).sample
        normalize_latents(autoencoder.quant_conv, autoencoder.post_quant_conv, before.mean)
        after = autoencoder.encode(images).latent_dist
        again = autoencoder.decode(after.mean).sample
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-4
    assert (after.mean.std((0, 2, 3)) - 1).abs().max() < 1e-4
    ratio = before.mean.std((0, 2, 3), keepdim=True)
    assert torch.allclose(after.std * ratio, before.std, rtol=1e-3)
    assert torch.allclose(decoded, again, atol=1e-4)


class ExactDenoiser(nn.Module):
    """Knows the clean latents and so predicts v exactly, up to an offset."""

    def __init__(self, latents: torch.Tensor, alphas_cumprod: torch.Tensor, offset: float) -> None:
        super().__init__()
        self.latents, self.alphas_cumprod, self.offset = latents, alphas_cumprod, offset

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor):
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * self.latents) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * self.latents
        return type("Output", (), {"sample": velocity + self.offset})


def test_the_denoiser_loss_is_the_weighted_squared_error_of_v():
    latents, alphas_cumprod = torch.randn(4, 2, 3, 3), torch.tensor([0.5])  # snr 1
    ids = torch.zeros(4, 5, dtype=torch.long)
    for offset, expected in ((0.0, 0.0), (2.0, 4.0)):  # weight (min(1, 5) + 1) / (1 + 1) = 1
        denoiser = ExactDenoiser(latents, alphas_cumprod, offset)
        text_encoder = lambda token_ids: (token_ids.float(),)  # noqa: E731
        loss = denoiser_loss(
            denoiser, text_encoder, latents, ids, ids[:1], alphas_cumprod, torch.Generator().manual_seed(0)
        )
        assert loss.item() == pytest.approx(expected, abs=1e-4)
