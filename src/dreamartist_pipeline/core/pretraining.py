"""Training the embedded base model from scratch: autoencoder first, then UNet and text encoder together.

Both stages share one loop (`fit_stage`): AdamW with warm-up and cosine decay, gradient clipping, an exponential moving
average of the weights, and a checkpoint that restores all of it. Every step draws its randomness from
(seed, rank, step), so an interrupted run that resumes ends in the same weights as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

Checkpoint = dict[str, Any]


class Autoencoder(Protocol):
    """What the autoencoder stage needs of a diffusers AutoencoderKL."""

    def encode(self, x: torch.Tensor) -> Any:
        """Return something whose `latent_dist` is the posterior of images `[B, 3, H, W]`."""

    def decode(self, z: torch.Tensor) -> Any:
        """Return something whose `sample` are the images of latents `[B, C, h, w]`."""


@dataclass(frozen=True)
class StageSettings:
    """How one stage is optimised; the schedule depends on `num_steps` only, never on the clock."""

    num_steps: int
    batch_size: int  # per process
    lr: float
    warmup_steps: int
    ema_decay: float
    seed: int
    checkpoint_every: int
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = True


@dataclass(frozen=True)
class StepReport:
    """What one step did; the gradient's norm is the one before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float


def fit_stage(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    settings: StageSettings,
    *,
    checkpoint: Checkpoint | None = None,
    save_checkpoint: Callable[[Checkpoint], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> None:
    """Optimise `parameters` in place and leave their moving averages in them.

    Args:
        parameters: what is trained, in a fixed order; a checkpoint stores them by that order.
        loss_of: draws a batch with the generator and returns its scalar loss.
        settings: the stage's schedule.
        checkpoint: state to resume from, as `save_checkpoint` received it.
        save_checkpoint: called every `checkpoint_every` steps and at the end, on rank 0 only.
        on_step: called after every step, on rank 0 only.
    """
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
    )
    averages = [p.detach().clone() for p in parameters]
    start = _restore(checkpoint, parameters, averages, optimizer) if checkpoint else 0
    for step in range(start, settings.num_steps):
        lr = settings.lr * warmup_cosine(step, settings.num_steps, settings.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = step_generator(settings.seed, _rank(), step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        grad_norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        done = step + 1
        if _rank() == 0 and on_step:
            on_step(StepReport(done, loss.item(), lr, float(grad_norm)))
        if _rank() == 0 and save_checkpoint and (done % settings.checkpoint_every == 0 or done == settings.num_steps):
            save_checkpoint(_snapshot(done, parameters, averages, optimizer))
    for parameter, average in zip(parameters, averages, strict=True):
        parameter.data.copy_(average)


@contextmanager
def averaged_weights(parameters: Sequence[nn.Parameter], checkpoint: Checkpoint) -> Iterator[None]:
    """Put a checkpoint's moving averages into the parameters for the duration, to look at what they make."""
    kept = [p.detach().clone() for p in parameters]
    for parameter, average in zip(parameters, checkpoint["averages"], strict=True):
        parameter.data.copy_(average)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)


def warmup_cosine(step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then half a cosine down to 0.02."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))


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


def _snapshot(
    step: int, parameters: Sequence[nn.Parameter], averages: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> Checkpoint:
    return {
        "step": step,
        "parameters": [p.detach().clone() for p in parameters],
        "averages": [a.clone() for a in averages],
        "optimizer": optimizer.state_dict(),
    }


def _restore(
    checkpoint: Checkpoint,
    parameters: Sequence[nn.Parameter],
    averages: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    for parameter, average, value, mean in zip(
        parameters, averages, checkpoint["parameters"], checkpoint["averages"], strict=True
    ):
        parameter.data.copy_(value)
        average.copy_(mean)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return int(checkpoint["step"])


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
) -> torch.Tensor:
    """v-prediction loss with a capped-SNR weight and prompts dropped for classifier-free guidance.

    The weight (min(snr, γ) + 1) / (snr + 1) keeps full weight at high noise, where captions are learned, unlike
    min-SNR for v-prediction (Hang et al. 2023), which fades there.

    Args:
        latents: `[B, C, h, w]`.
        token_ids: `[B, L]` of the captions; `empty_ids` `[1, L]` stands in for dropped ones.
        alphas_cumprod: `[T]` of the noise schedule.
    """
    batch, device = len(latents), latents.device
    dropped = torch.rand(batch, 1, device=device, generator=generator) < prompt_dropout
    hidden = text_encoder(torch.where(dropped, empty_ids, token_ids))[0]
    timesteps = torch.randint(len(alphas_cumprod), (batch,), device=device, generator=generator)
    noise = torch.randn(latents.shape, device=device, generator=generator)
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    prediction = unet(noisy_latents, timesteps, hidden).sample.float()
    snr = (alpha / (1 - alpha)).flatten()
    weight = (snr.clamp(max=snr_gamma) + 1) / (snr + 1)
    return (weight * F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))).mean()
