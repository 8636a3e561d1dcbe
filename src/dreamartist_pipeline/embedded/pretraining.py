"""Training the embedded base model: autoencoder, text and image towers, then UNet and text encoder.

All stages share the loop of concept training (`core.trainer`), with Muon for the hidden matrices and AdamW for the
rest, warm-up, a constant rate and a decay, gradient clipping, a moving average of the weights, and checkpoints. Every
step draws its randomness from (seed, rank, step), so an interrupted run that resumes ends in the same weights as one
that was never interrupted.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.core.trainer import Averages, FinishedStep, TrainingState, train
from dreamartist_pipeline.params import StageParams

Checkpoint = dict[str, Any]
_REPORT_EVERY = 25  # steps
_SIZED_AFTER = 100  # steps, whose throughput decides how many fit into a stage's minutes


class Checkpoints(Protocol):
    """Where the checkpoints of the stages are kept, by name."""

    def of_recipe(self, recipe: str) -> Checkpoints:
        """Return those of one recipe, which no other one sees."""

    def load(self, name: str) -> Checkpoint | None:
        """Return the latest of that name, or None."""

    def save(self, name: str, state: Checkpoint) -> None:
        """Replace it, whole or not at all."""


class Autoencoder(Protocol):
    """What the autoencoder stage needs of a diffusers AutoencoderKL."""

    def encode(self, x: torch.Tensor) -> Any:
        """Return something whose `latent_dist` is the posterior of images `[B, 3, H, W]`."""

    def decode(self, z: torch.Tensor) -> Any:
        """Return something whose `sample` are the images of latents `[B, C, h, w]`."""


@dataclass(frozen=True)
class StageSettings:
    """How one stage is optimised."""

    num_steps: int
    batch_size: int  # per process
    lr: float
    warmup_steps: int
    ema_decay: float
    seed: int
    decay_share: float = 0.2
    decay_now: bool = False
    minutes: float | None = None
    checkpoint_minutes: float = 10.0
    matrix_lr: float | None = None  # of the parameters handed over as matrices; None: they are AdamW's too
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = False  # autocast; on a CPU without native bfloat16 it is several times slower than float32

    @classmethod
    def of(cls, stage: StageParams, seed: int, bf16: bool = False) -> StageSettings:
        """Return the settings that a stage's parameters describe."""
        names = {field.name for field in fields(cls)}
        return cls(**stage.model_dump(include=names), seed=seed, bf16=bf16)


@dataclass(frozen=True)
class Plan:
    """How long a stage takes, and from which step on its rate falls; fixed once the decay has begun."""

    num_steps: int
    decay_from: int

    @classmethod
    def lasting(cls, num_steps: int, decay_share: float) -> Plan:
        """Return the plan of so many steps, the last share of which are the decay."""
        return cls(num_steps, num_steps - math.ceil(decay_share * num_steps))

    @classmethod
    def decaying_from(cls, step: int, decay_share: float) -> Plan:
        """Return the plan whose decay begins at `step` and makes up its share of all steps."""
        return cls(max(step + 1, round(step / (1 - min(decay_share, 0.99)))), step)


@dataclass(frozen=True)
class StepReport:
    """What one step did, and of how many; the gradient's norm is the one before clipping, seconds its duration."""

    step: int
    num_steps: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


class ProgressBar(Protocol):
    """What reporting needs of a tqdm bar."""

    total: float | None

    def update(self) -> object:
        """Count one more step."""

    def set_postfix(self, **values: str) -> None:
        """Show values beside the bar."""


class StageReporter:
    """Moves a stage's progress bar, and from time to time shows and tracks what the last steps did on average.

    Args:
        name: of the stage.
        batch_size: of all processes together.
        bar: the progress bar.
        tracker: where curves go: loss, rate, gradient norm, samples per second, done share and hours to go.
    """

    def __init__(self, name: str, batch_size: int, bar: ProgressBar, tracker: Tracker) -> None:
        self._name, self._batch_size, self._bar, self._tracker = name, batch_size, bar, tracker
        self._reports: list[StepReport] = []

    def __call__(self, report: StepReport) -> None:
        """Take note of one step."""
        self._bar.total = report.num_steps
        self._bar.update()
        self._reports.append(report)
        if report.step % _REPORT_EVERY and report.step != report.num_steps:
            return
        count = len(self._reports)
        loss, seconds = (sum(getattr(r, key) for r in self._reports) / count for key in ("loss", "seconds"))
        self._reports.clear()
        samples_per_s = self._batch_size / seconds
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{report.lr:.1e}", samples_per_s=f"{samples_per_s:.0f}")
        values = {
            "loss": loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "samples": report.step * self._batch_size,
            "samples_per_s": samples_per_s,
            "done": report.step / report.num_steps,
            "hours_to_go": (report.num_steps - report.step) * seconds / 3600,
        }
        self._tracker.log_metrics({f"{self._name}/{key}": value for key, value in values.items()}, step=report.step)


def fit_stage(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    settings: StageSettings,
    *,
    matrices: Sequence[nn.Parameter] = (),
    checkpoint: Checkpoint | None = None,
    save_checkpoint: Callable[[Checkpoint], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> None:
    """Optimise `parameters` in place and leave their moving averages in them.

    Args:
        parameters: what is trained, in a fixed order; a checkpoint stores them by that order.
        loss_of: draws a batch with the generator and returns its scalar loss.
        settings: the stage's schedule.
        matrices: those of `parameters` that Muon optimises (see `hidden_matrices`); AdamW optimises the others.
        checkpoint: state to resume from, as `save_checkpoint` received it.
        save_checkpoint: called every `checkpoint_minutes`, at the end, and before a stop by SIGINT or SIGTERM ends the
            stage, on rank 0 only; the parameters hold their averages meanwhile.
        on_step: called after every step, on rank 0 only.

    Raises:
        KeyboardInterrupt: the stage was stopped; its last step is in the checkpoint.
    """
    stage = _Stage(parameters, matrices, loss_of, settings, checkpoint)
    is_first = _rank() == 0
    saved = clock = time.monotonic()
    with stop_requests() as stopped:
        for done in stage.steps():
            clock, previous = time.monotonic(), clock
            if on_step and is_first:
                on_step(stage.report(done, clock - previous))
            due = clock - saved >= 60 * settings.checkpoint_minutes or stage.is_done or stopped()
            if due and save_checkpoint and is_first:
                checkpoint = stage.checkpoint()
                with stage.state.averaged():
                    save_checkpoint(checkpoint)
                saved = clock = time.monotonic()
            if stopped():
                raise KeyboardInterrupt(f"stopped after step {done.step}; the same command continues")
    stage.state.keep_averages()


class _Stage:
    """A stage's training state, its plan, and what the training loop asks of it."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        loss_of: Callable[[torch.Generator], torch.Tensor],
        settings: StageSettings,
        checkpoint: Checkpoint | None,
    ) -> None:
        averages = Averages(parameters, warmed_up_ema(settings.ema_decay))
        self.state = TrainingState(parameters, _build_optimizers(parameters, matrices, settings), averages)
        if checkpoint:
            self.state.load_state_dict(checkpoint["state"])
        self._loss_of, self._settings, self._device = loss_of, settings, parameters[0].device
        self._plan = plan_of(settings, checkpoint)
        self._is_sized = checkpoint is not None or not settings.minutes

    @property
    def is_done(self) -> bool:
        return self.state.step == self._plan.num_steps

    def steps(self) -> Iterator[FinishedStep[None]]:
        begun = time.monotonic()
        while not self.is_done:
            yield from train(
                self.state,
                self._plan.num_steps if self._is_sized else min(_SIZED_AFTER, self._plan.num_steps),
                set_rates=self._set_rates,
                loss_of=self._loss_of_step,
                clip=self._clip,
                average_gradients=average_gradients,
            )
            if not self._is_sized:
                self._plan = _sized(self._settings, (time.monotonic() - begun) / self.state.step)
                self._is_sized = True

    def report(self, done: FinishedStep[None], seconds: float) -> StepReport:
        lr = self._settings.lr * self._factor(done.step - 1)
        norm = done.grad_norms.norm().item()
        return StepReport(done.step, self._plan.num_steps, done.loss.item(), lr, norm, seconds)

    def checkpoint(self) -> Checkpoint:
        plan = [self._plan.num_steps, self._plan.decay_from]
        return {"step": self.state.step, "plan": plan, "state": self.state.state_dict()}

    def _factor(self, step: int) -> float:
        return warmup_stable_decay(step, self._plan, self._settings.warmup_steps)

    def _set_rates(self, step: int) -> None:
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * self._factor(step)

    def _loss_of_step(self, step: int) -> tuple[torch.Tensor, None]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.bf16):
            return self._loss_of(step_generator(self._settings.seed, _rank(), step, self._device)), None

    def _clip(self, norms: torch.Tensor) -> None:
        nn.utils.clip_grads_with_norm_(self.state.parameters, self._settings.max_grad_norm, norms.norm())


def warmed_up_ema(decay: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the weight of the newest of n values: 1 − decay, and more at the start, where it is 9 / (n + 9)."""
    return lambda num_steps: 1 - (num_steps / (num_steps + 9)).clamp(max=decay)


def plan_of(settings: StageSettings, checkpoint: Checkpoint | None) -> Plan:
    """Return the plan of the parameters, or that of the checkpoint where its decay has begun already."""
    if checkpoint is None:
        return Plan.lasting(settings.num_steps, settings.decay_share)
    step, begun = checkpoint["step"], Plan(*checkpoint["plan"])
    if step > begun.decay_from:
        return begun
    if settings.decay_now:
        return Plan.decaying_from(step, settings.decay_share)
    return begun if settings.minutes else Plan.lasting(max(step, settings.num_steps), settings.decay_share)


def _sized(settings: StageSettings, seconds_per_step: float) -> Plan:
    """Return the plan that takes `settings.minutes` in all, the same on every rank."""
    num_steps = [max(_SIZED_AFTER + 1, int(60 * (settings.minutes or 0) / seconds_per_step))]
    if dist.is_initialized():
        dist.broadcast_object_list(num_steps)
    return Plan.lasting(num_steps[0], settings.decay_share)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM only make the yielded function return True; no signal reaches other threads."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    previous = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def warmup_stable_decay(step: int, plan: Plan, warmup_steps: int) -> float:
    """Linear warm-up to 1, a constant rate, then 1 − √progress down to 0 (Hägele et al. 2024)."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    progress = (step - plan.decay_from) / (plan.num_steps - plan.decay_from)
    return warm * (1 - math.sqrt(max(0.0, progress)))


def step_generator(seed: int, rank: int, step: int, device: torch.device) -> torch.Generator:
    """Return the generator of one step on one rank."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 64 + rank)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over all processes, as one flat message; nothing to do in a single process."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# ---------------------------------------------------------------------------------------------- optimizers

_MIN_MATRIX_SIDE = 16  # below it a weight reads or writes pixels, latents or an embedding: AdamW's work


def hidden_matrices(*networks: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear and convolution layers inside the networks, but not their narrow ends."""
    layers = [m for network in networks for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    weights = [cast(nn.Parameter, layer.weight) for layer in layers]
    return [w for w in weights if min(len(w), w[0].numel()) >= _MIN_MATRIX_SIDE]


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made orthogonal (Jordan et al. 2024), for matrices and convolution kernels.

    A kernel `[out, in, h, w]` is the matrix `[out, in·h·w]`. Updates have the size that AdamW's would have (Liu et al.
    2025: times 0.2·sqrt(longest side)), so learning rates carry over. In a process group every rank makes the updates
    of some matrices and hands them to the others. PyTorch's own takes no kernels and computes in bfloat16 only, which
    many a CPU cannot do fast.

    Args:
        matrices: what is optimised; all need gradients at every step.
        lr: learning rate.
        momentum: decay of the gradients' average; Nesterov's variant.
        weight_decay: decoupled.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices."""
        for group in self.param_groups:
            matrices: list[nn.Parameter] = group["params"]
            updates = [self._direction(matrix, group["momentum"]) for matrix in matrices]
            _orthogonalize_all(updates)
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(update.shape) ** 0.5
                matrix.sub_(update.view_as(matrix), alpha=group["lr"] * size)

    def _direction(self, matrix: nn.Parameter, momentum: float) -> torch.Tensor:
        """Return the gradient with momentum as a matrix `[out, rest]`."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["momentum"], momentum).reshape(len(matrix), -1)


def _orthogonalize_all(updates: Sequence[torch.Tensor]) -> None:
    """Make all updates orthogonal in place; the ranks of a process group share the work."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    owners = _share_out([min(u.shape) * u.numel() for u in updates], world)
    by_owner = [[u for u, its_owner in zip(updates, owners, strict=True) if its_owner == o] for o in range(world)]
    for update in by_owner[_rank()]:
        update.copy_(orthogonalized(update))
    if world > 1:
        for owner, owned in enumerate(by_owner):
            _hand_out(owned, owner)


def _hand_out(tensors: Sequence[torch.Tensor], owner: int) -> None:
    """Give every rank the owner's tensors, in place and as one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, owner)
    for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def _share_out(costs: Sequence[int], num_owners: int) -> list[int]:
    """Give each piece of work, largest first, to the owner with the least so far; return the owner of each."""
    totals, owners = [0] * num_owners, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = totals.index(min(totals))
        totals[owners[index]] += costs[index]
    return owners


def orthogonalized(matrix: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """Return about U·Vᵀ of a matrix U·S·Vᵀ: all singular values become about 1 (Newton-Schulz, Jordan et al. 2024).

    Iterates on the square Gram matrix of the shorter side and multiplies the long one once, at the end: a third of
    the work for a 3×3 kernel.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(num_iterations):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    result: torch.Tensor = product @ x
    return result.T if len(matrix) > matrix.shape[1] else result


def _build_optimizers(
    parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], settings: StageSettings
) -> list[torch.optim.Optimizer]:
    chosen = {id(matrix) for matrix in matrices} if settings.matrix_lr else set()
    others = [p for p in parameters if id(p) not in chosen]
    decay = settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        optimizers.append(torch.optim.AdamW(others, settings.lr, betas=(0.9, 0.99), weight_decay=decay, fused=True))
    if chosen and settings.matrix_lr:
        optimizers.append(Muon(matrices, settings.matrix_lr, weight_decay=decay))
    return optimizers


# ---------------------------------------------------------------------------------------------- autoencoder


def autoencoder_loss(autoencoder: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """L1 + squared error + an edge term on image gradients, with a whisper of KL to keep the posterior bounded.

    The edge term is what keeps outlines crisp without an adversary. `images` is `[B, 3, H, W]` in [-1, 1].
    """
    posterior = autoencoder.encode(images).latent_dist
    reconstruction: torch.Tensor = autoencoder.decode(posterior.sample()).sample.float()
    error = reconstruction - images
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    divergence: torch.Tensor = posterior.kl().float().mean()
    return error.abs().mean() + 0.5 * error.pow(2).mean() + 0.3 * edges + 1e-6 * divergence


def psnr(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio per image in dB, `[B]`, of images in [-1, 1]."""
    return 10 * torch.log10(4 / (reconstruction - images).pow(2).mean((1, 2, 3)).clamp(min=1e-10))


@torch.no_grad()
def normalize_latents(quant: nn.Conv2d, post_quant: nn.Conv2d, latents: torch.Tensor) -> None:
    """Fold the latents' per-channel mean and deviation into the 1×1 quantisation convolutions, exactly.

    Afterwards latents have zero mean and unit deviation per channel and `scaling_factor` is 1.

    Args:
        quant, post_quant: the autoencoder's `quant_conv` and `post_quant_conv`, with biases; changed in place.
        latents: `[N, C, h, w]` posterior means of typical images under the unchanged autoencoder.
    """
    channels = latents.shape[1]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    assert quant.bias is not None and post_quant.bias is not None
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # log-variance rows
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= std.view(1, -1, 1, 1)


# ---------------------------------------------------------------------------------------------- denoiser


def denoiser_loss(
    unet: nn.Module,
    text_encoder: nn.Module,
    latents: torch.Tensor,
    token_ids: torch.Tensor,
    empty_ids: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    generator: torch.Generator,
    *,
    prompt_dropout: float = 0.1,
    snr_gamma: float = 5.0,
    density: str = "uniform",
) -> torch.Tensor:
    """v-prediction loss with a capped-SNR weight and prompts dropped for classifier-free guidance.

    The weight (min(snr, γ) + 1) / (snr + 1) keeps full weight at high noise, where captions are learned, unlike
    min-SNR for v-prediction (Hang et al. 2023), which fades there.

    Args:
        latents: `[B, C, h, w]`.
        token_ids: `[B, L]` of the captions; `empty_ids` `[1, L]` stands in for dropped ones.
        alphas_cumprod: `[T]` of the noise schedule.
        density: of the timesteps, see `draw_timesteps`.
    """
    batch, device = len(latents), latents.device
    dropped = torch.rand(batch, 1, device=device, generator=generator) < prompt_dropout
    hidden = text_encoder(torch.where(dropped, empty_ids, token_ids))[0]
    timesteps = draw_timesteps(batch, len(alphas_cumprod), density, generator)
    noise = torch.randn(latents.shape, device=device, generator=generator)
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    prediction = unet(noisy_latents, timesteps, hidden).sample.float()
    snr = (alpha / (1 - alpha)).flatten()
    weight = (snr.clamp(max=snr_gamma) + 1) / (snr + 1)
    return (weight * F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))).mean()


def draw_timesteps(num: int, num_train_timesteps: int, density: str, generator: torch.Generator) -> torch.Tensor:
    """Draw int64 timesteps `[num]`: uniform, or logit-normal around the middle (Esser et al. 2024, m = 0, s = 1)."""
    if density == "uniform":
        return torch.randint(num_train_timesteps, (num,), device=generator.device, generator=generator)
    fraction = torch.randn(num, device=generator.device, generator=generator).sigmoid()
    return (fraction * num_train_timesteps).long()
