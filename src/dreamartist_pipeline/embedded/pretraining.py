"""Training loop of the embedded base model's stages and of the judge, and the losses of the base model.

All stages share the loop of concept training (`core.trainer`): Muon for hidden matrices, AdamW for all other
parameters, warm-up, constant rate and decay, gradient clipping, a moving average of the weights, and checkpoints. The
randomness of a step depends on (seed, rank, step) only, so an interrupted and resumed run ends in the same weights as
an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from dreamartist_pipeline.core.checkpoints import Checkpoint, Checkpoints, Pauses, stop_requests
from dreamartist_pipeline.core.processes import num_ranks, on_any_rank, rank, sum_over_ranks
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.core.trainer import Averages, FinishedStep, TrainingState, train, whole_batch
from dreamartist_pipeline.errors import STOPPED_BY_SIGNAL, StoppedEarly
from dreamartist_pipeline.params import StageParams

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_REPORT_EVERY = 25  # steps
_SIZED_FROM, _SIZED_AFTER = 20, 100  # steps; their throughput gives the number of steps where `minutes` is set
_MAX_GRAD_NORM = 1.0


def stage_device() -> torch.device:
    """Return where the stages run: on a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 natively; emulation is slower than float32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True)
class Plan:
    """Number of steps of a stage, and the step from which its rate decays; fixed once the decay has begun."""

    num_steps: int
    decay_from: int

    @classmethod
    def lasting(cls, num_steps: int, decay_share: float) -> Plan:
        """Return the plan of `num_steps` steps whose last share is the decay."""
        return cls(num_steps, num_steps - math.ceil(decay_share * num_steps))

    @classmethod
    def decaying_from(cls, step: int, decay_share: float) -> Plan:
        """Return the plan whose decay begins at `step` and takes its share of all steps."""
        return cls(max(step + 1, round(step / (1 - min(decay_share, 0.99)))), step)


@dataclass(frozen=True)
class StepReport:
    """Figures of one step.

    Attributes:
        step: counted from 1.
        num_steps: of the stage.
        loss: of this process's batch.
        lr: AdamW's learning rate.
        grad_norm: before clipping.
        seconds: duration of the step.
    """

    step: int
    num_steps: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


class StageReporter:
    """Updates a progress bar every step, and logs means over the last steps every `_REPORT_EVERY` steps.

    Args:
        name: of the stage; prefix of the metrics.
        batch_size: summed over all processes.
        bar: the progress bar.
        tracker: receives loss, rate, gradient norm, samples, samples per second, share done and hours left.
    """

    def __init__(self, name: str, batch_size: int, bar: tqdm[Any], tracker: Tracker) -> None:
        self._name, self._batch_size, self._bar, self._tracker = name, batch_size, bar, tracker
        self._reports: list[StepReport] = []

    def __call__(self, report: StepReport) -> None:
        """Record one step."""
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


def run_stage(
    name: str,
    networks: Sequence[nn.Module],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    stage: StageParams,
    seed: int,
    store: Checkpoints,
    tracker: Tracker,
    *,
    bf16: bool = False,
    after_save: Callable[[int], None] | None = None,
) -> None:
    """Train the networks of a stage in place, from its latest checkpoint on; called on every rank.

    Args:
        name: of the stage: of its checkpoint, progress bar and metrics.
        networks: all their parameters train; a checkpoint stores them in this order.
        loss_of: see `fit_stage`.
        stage: length and optimisation.
        seed: of all random draws.
        store: where checkpoints are.
        tracker: receives the curves.
        bf16: see `fit_stage`.
        after_save: called with the step after every checkpoint, on rank 0 only; the networks hold their averages.

    Raises:
        StoppedEarly: the stage was stopped; its last step is in the checkpoint.
    """
    checkpoint = store.load(name)

    def save(state: Checkpoint) -> None:
        store.save(name, state)
        if after_save:
            after_save(state["step"])

    start = checkpoint["step"] if checkpoint else 0
    batch_size = stage.batch_size * num_ranks()
    with tqdm(total=stage.num_steps, initial=start, desc=name, unit="step", disable=rank() > 0) as bar:
        try:
            fit_stage(
                [parameter for network in networks for parameter in network.parameters()],
                loss_of,
                stage,
                seed,
                bf16=bf16,
                matrices=hidden_matrices(*networks),
                checkpoint=checkpoint,
                save_checkpoint=save,
                on_step=StageReporter(name, batch_size, bar, tracker),
            )
        except StoppedEarly as stop:
            raise StoppedEarly(f"{name}: {stop}", stop.exit_code) from None


def fit_stage(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    settings: StageParams,
    seed: int,
    *,
    bf16: bool = False,
    matrices: Sequence[nn.Parameter] = (),
    checkpoint: Checkpoint | None = None,
    save_checkpoint: Callable[[Checkpoint], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> None:
    """Optimise `parameters` in place and leave their moving averages in them.

    Args:
        parameters: what is trained; a checkpoint stores them in this order.
        loss_of: draws a batch with the generator and returns its scalar loss.
        settings: length and optimisation.
        seed: of all random draws.
        bf16: autocast to bfloat16; on a CPU without native bfloat16 it is several times slower than float32.
        matrices: those of `parameters` that Muon optimises (see `hidden_matrices`); AdamW optimises the others.
        checkpoint: state to resume from, as `save_checkpoint` received it.
        save_checkpoint: called every `checkpoint_minutes`, at the end, and when SIGINT or SIGTERM stops the stage; on
            rank 0 only, while the parameters hold their averages.
        on_step: called after every step, on rank 0 only.

    Raises:
        StoppedEarly: the stage was stopped; its last step is in the checkpoint. All ranks stop at the same step.
    """
    stage = _Stage(parameters, matrices, loss_of, settings, seed, bf16, checkpoint)
    is_first = rank() == 0
    clock = time.monotonic()
    with stop_requests() as stop_requested:
        pauses = Pauses(stop_requested, settings.checkpoint_minutes)
        for done in stage.steps():
            clock, previous = time.monotonic(), clock
            if on_step and is_first:
                on_step(stage.report(done, clock - previous))
            stopped = on_any_rank(pauses.stops())
            due = pauses.checkpoint_is_due() or stage.is_done or stopped
            if due and save_checkpoint and is_first:
                checkpoint = stage.checkpoint()
                with pauses.saving(), stage.state.averaged():
                    save_checkpoint(checkpoint)
                clock = time.monotonic()
            if stopped:
                raise StoppedEarly(f"stopped after step {done.step}; the same command continues", STOPPED_BY_SIGNAL)
    stage.state.keep_averages()


class _Stage:
    """Training state and plan of a stage, with the callbacks of the training loop."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        loss_of: Callable[[torch.Generator], torch.Tensor],
        settings: StageParams,
        seed: int,
        bf16: bool,
        checkpoint: Checkpoint | None,
    ) -> None:
        averages = Averages(parameters, warmed_up_ema(settings.ema_decay))
        self.state = TrainingState(parameters, _build_optimizers(parameters, matrices, settings), averages)
        if checkpoint:
            self.state.load_state_dict(checkpoint["state"])
        self._loss_of, self._settings, self._seed, self._bf16 = loss_of, settings, seed, bf16
        self._device = parameters[0].device
        self._plan = plan_of(settings, checkpoint)
        self._is_sized = checkpoint is not None or not settings.minutes

    @property
    def is_done(self) -> bool:
        return self.state.step == self._plan.num_steps

    def steps(self) -> Iterator[FinishedStep[None]]:
        if not self._is_sized:
            yield from self._steps_to(_SIZED_FROM)
            begun, first = time.monotonic(), self.state.step
            yield from self._steps_to(_SIZED_AFTER)
            self._plan = _sized(self._settings, (time.monotonic() - begun) / max(1, self.state.step - first))
            self._is_sized = True
        yield from self._steps_to(self._plan.num_steps)

    def _steps_to(self, last: int) -> Iterator[FinishedStep[None]]:
        yield from train(
            self.state,
            min(last, self._plan.num_steps),
            set_rates=self._set_rates,
            gradients_of=whole_batch(self.state, self._loss_of_step),
            clip=self._clip,
            average_gradients=average_gradients,
        )

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
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return self._loss_of(step_generator(self._seed, rank(), step, self._device)), None

    def _clip(self, norms: torch.Tensor) -> None:
        nn.utils.clip_grads_with_norm_(self.state.parameters, _MAX_GRAD_NORM, norms.norm())


def warmed_up_ema(decay: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return n -> weight of the newest of n values in the moving average: 1 − decay, at least 9 / (n + 9)."""
    return lambda num_steps: 1 - (num_steps / (num_steps + 9)).clamp(max=decay)


def plan_of(settings: StageParams, checkpoint: Checkpoint | None) -> Plan:
    """Return the plan of the settings, or that of the checkpoint if its decay has begun or its length was measured."""
    if checkpoint is None:
        return Plan.lasting(settings.num_steps, settings.decay_share)
    step, stored = checkpoint["step"], Plan(*checkpoint["plan"])
    if step > stored.decay_from:
        return stored
    if settings.decay_now:
        return Plan.decaying_from(step, settings.decay_share)
    return stored if settings.minutes else Plan.lasting(max(step, settings.num_steps), settings.decay_share)


def _sized(settings: StageParams, seconds_per_step: float) -> Plan:
    """Return the plan that takes `settings.minutes` in total, the same on every rank."""
    num_steps = [max(_SIZED_AFTER + 1, int(60 * (settings.minutes or 0) / seconds_per_step))]
    if dist.is_initialized():
        dist.broadcast_object_list(num_steps)
    return Plan.lasting(num_steps[0], settings.decay_share)


def warmup_stable_decay(step: int, plan: Plan, warmup_steps: int) -> float:
    """Return the rate factor: linear warm-up to 1, constant, then 1 − √progress down to 0 (Hägele et al. 2024)."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    progress = (step - plan.decay_from) / (plan.num_steps - plan.decay_from)
    return warm * (1 - math.sqrt(max(0.0, progress)))


def step_generator(seed: int, rank: int, step: int, device: torch.device) -> torch.Generator:
    """Return the generator of one step on one rank."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 64 + rank)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over all processes, in one all-reduce; does nothing in a single process."""
    if num_ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    sum_over_ranks(gradients)
    for gradient in gradients:
        gradient.div_(num_ranks())


# ---------------------------------------------------------------------------------------------- optimizers

_MIN_MATRIX_SIDE = 16  # below it a layer reads or writes pixels or latents, and AdamW optimises it


def hidden_matrices(*networks: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear and convolution layers with at least `_MIN_MATRIX_SIDE` inputs and outputs."""
    layers = [m for network in networks for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    weights = [cast(nn.Parameter, layer.weight) for layer in layers]
    return [w for w in weights if min(len(w), w[0].numel()) >= _MIN_MATRIX_SIDE]


class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalised updates (Jordan et al. 2024), for matrices and convolution kernels.

    A kernel `[out, in, h, w]` is the matrix `[out, in·h·w]`. Updates are scaled by 0.2·sqrt(longest side), the size of
    AdamW's updates (Liu et al. 2025), so learning rates carry over. In a process group each rank orthogonalises some of
    the matrices and broadcasts them. `torch.optim.Muon` takes no kernels and computes in bfloat16, slow on many CPUs.

    Args:
        matrices: what is optimised; all need gradients at every step.
        lr: learning rate.
        momentum: decay of the gradients' average (Nesterov).
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
            matrices: list[torch.Tensor] = group["params"]
            updates = self._directions(matrices, group["momentum"])
            _orthogonalize_all(updates)
            torch._foreach_mul_(updates, [0.2 * float(max(update.shape)) ** 0.5 for update in updates])
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            kernels = [update.view_as(matrix) for update, matrix in zip(updates, matrices, strict=True)]
            torch._foreach_add_(matrices, kernels, alpha=-group["lr"])

    def _directions(self, matrices: Sequence[torch.Tensor], momentum: float) -> list[torch.Tensor]:
        """Return the gradients with momentum as matrices `[out, rest]`."""
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        gradients = [cast(torch.Tensor, matrix.grad) for matrix in matrices]
        averages = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return [update.flatten(1) for update in torch._foreach_lerp(gradients, averages, momentum)]


def _orthogonalize_all(updates: Sequence[torch.Tensor]) -> None:
    """Orthogonalise all updates in place; the ranks of a process group share the work."""
    world = num_ranks()
    owners = _assign_owners([min(u.shape) * u.numel() for u in updates], world)
    by_owner = [[u for u, owner in zip(updates, owners, strict=True) if owner == index] for index in range(world)]
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for update in by_owner[rank()]:
        by_shape.setdefault(update.shape, []).append(update)
    for alike in by_shape.values():  # together: a GPU computes one matrix of a small network faster than it starts
        torch._foreach_copy_(alike, orthogonalized(torch.stack(alike)).unbind())
    if world > 1:
        for owner, owned in enumerate(by_owner):
            _broadcast(owned, owner)


def _broadcast(tensors: Sequence[torch.Tensor], owner: int) -> None:
    """Copy the owner's tensors to every rank, in place and in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, owner)
    for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def _assign_owners(costs: Sequence[int], num_owners: int) -> list[int]:
    """Return the owner of each task: the largest task first, to the owner with the lowest total cost so far."""
    totals, owners = [0] * num_owners, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = totals.index(min(totals))
        totals[owners[index]] += costs[index]
    return owners


def orthogonalized(matrices: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """Return approximately U·Vᵀ of matrices U·S·Vᵀ, `[N, out, in]` (Newton-Schulz iteration, Jordan et al. 2024).

    Iterates on the Gram matrices of the shorter side and multiplies by the matrices once at the end: a third of the
    work for a 3×3 kernel.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = torch.bmm(x, x.mT)
    product = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for _ in range(num_iterations):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = torch.bmm(polynomial, product)
        gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    result = torch.bmm(product, x)
    return result.mT if is_tall else result


def _build_optimizers(
    parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], settings: StageParams
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


def autoencoder_loss(autoencoder: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """L1 + squared error + L1 of image gradients + a small KL term that bounds the posterior.

    The gradient term keeps outlines sharp without an adversarial loss. `images` is `[B, 3, H, W]` in [-1, 1].
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
    """Fold the latents' per-channel mean and standard deviation into the 1×1 quantisation convolutions, exactly.

    Afterwards latents have zero mean and unit standard deviation per channel, for a `scaling_factor` of 1.

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
    """v-prediction loss with a capped-SNR weight and prompt dropout for classifier-free guidance.

    The weight (min(snr, γ) + 1) / (snr + 1) stays 1 at high noise, where captions are learned; min-SNR for v-prediction
    (Hang et al. 2023) goes to 0 there.

    Args:
        unet: predicts v.
        text_encoder: returns text states of token ids.
        latents: `[B, C, h, w]`.
        token_ids: `[B, L]` of the captions.
        empty_ids: `[1, L]`, in place of dropped captions.
        alphas_cumprod: `[T]` of the noise schedule.
        generator: of dropout, timesteps and noise.
        prompt_dropout: share of dropped captions.
        snr_gamma: γ.
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
    """Draw int64 timesteps `[num]`: uniform, or logit-normal (Esser et al. 2024, m = 0, s = 1)."""
    if density == "uniform":
        return torch.randint(num_train_timesteps, (num,), device=generator.device, generator=generator)
    fraction = torch.randn(num, device=generator.device, generator=generator).sigmoid()
    return (fraction * num_train_timesteps).long()
