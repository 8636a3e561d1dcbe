"""What the hardware can do at most, and how much a training step needs: the model FLOPs utilization (MFU)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.prompt_tokens import PromptTokens
from dreamartist_pipeline.params import TrainingParams
from speed.designs import leaves
from speed.timing import Spread, clock_for

_MATRIX_SIDE, _COPY_BYTES = 8192, 2**30
_ROUNDS = 10


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: of a bfloat16 matrix product, and of a copy (bytes read and written)."""

    flops_per_second: float
    bytes_per_second: float

    def facts(self) -> dict[str, str]:
        """Return what a report says about them."""
        return {
            "bfloat16 matrix product": f"{self.flops_per_second / 1e12:.3g} TFLOP/s",
            "copy": f"{self.bytes_per_second / 1e12:.3g} TB/s",
        }


def measure_ceilings(device: torch.device, matrix_side: int = _MATRIX_SIDE, copy_bytes: int = _COPY_BYTES) -> Ceilings:
    """Time a product of two square matrices of random bfloat16 numbers, and a copy; the fastest rounds count."""
    left, right = (torch.randn(matrix_side, matrix_side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return Ceilings(
        2 * matrix_side**3 / _fastest(lambda: torch.mm(left, right), device),
        2 * copy_bytes / _fastest(lambda: target.copy_(source), device),
    )


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    clock = clock_for(device) if device.type == "cuda" else time.perf_counter
    run()
    seconds = []
    for _ in range(_ROUNDS):
        begun = clock()
        run()
        seconds.append(clock() - begun)
    return Spread.of(seconds).low


def step_flops(outline: Backbone, params: TrainingParams, side_px: int, part: str = "step") -> float:
    """Return the FLOPs of a step: forward and activation gradients of the frozen networks, without adapters.

    Recomputation by gradient checkpointing does not count. The text encoders (part "step")
    run on the distinct prompts of a step; their backward pass counts as much as the forward pass.

    Args:
        outline: the base model on the meta device.
        params: of the training.
        side_px: of the pictures.
        part: "step", or "unet" for the UNet alone.
    """
    model = dataclasses.replace(outline, device=torch.device("cpu"))  # there is no autocast for meta
    num_rows = 2 * (params.batch_size + params.regularization_batch_size)
    num_prompts = 2 * (min(len(params.templates), params.batch_size) + params.regularization_batch_size)
    side = side_px // model.latent_scale
    latents = torch.zeros(num_rows, model.latent_channels, side, side, device="meta")
    conditioning = leaves(model.encode(_tokens(model, num_rows), params.clip_skip))
    with FlopCounterMode(display=False) as unet:
        prediction = model.denoise(latents, torch.zeros(num_rows, device="meta"), conditioning)
        torch.autograd.backward(prediction, torch.zeros_like(prediction))
    with FlopCounterMode(display=False) as text, torch.no_grad():
        model.encode(_tokens(model, num_prompts), params.clip_skip)
    return float(unet.get_total_flops() + (2 * text.get_total_flops() if part == "step" else 0))


def _tokens(model: Backbone, num_prompts: int) -> dict[str, PromptTokens]:
    return {
        encoder: PromptTokens(torch.zeros(num_prompts, tokenizer.model_max_length, dtype=torch.long, device="meta"))
        for encoder, tokenizer in model.tokenizers.items()
    }
