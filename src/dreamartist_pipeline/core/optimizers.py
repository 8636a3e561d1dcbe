"""Optimizers by name: AdamW of torch, and others whose libraries are imported on demand."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dreamartist_pipeline.errors import InputError

LIBRARIES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def check_optimizer(name: str, device: torch.device) -> None:
    """Check that an optimizer is available on a device.

    Raises:
        InputError: its library is not installed, or it needs a GPU.
    """
    if name == "adamw8bit" and device.type != "cuda":
        raise InputError(
            expected="a CUDA GPU, because optimizer adamw8bit requires one",
            got=f"{device.type}",
            remedy="choose adamw",
        )
    library = LIBRARIES.get(name)
    if library and find_spec(library) is None:
        raise InputError(
            expected=f"the library {library} for optimizer {name}",
            got="no such library",
            remedy=f"run: pip install {library}",
        )


def flatten(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """Move parameters into one flat parameter; they and their gradients become views of it and its gradient.

    Updating hundreds of small tensors would take longer than the forward and backward pass.
    """
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    views = zip(parameters, torch.split(flat.data, sizes), torch.split(flat.grad, sizes), strict=True)
    for parameter, values, gradient in views:
        parameter.data = values.view(parameter.shape)
        parameter.grad = gradient.view(parameter.shape)
    return flat


def step_unless(skip: torch.Tensor, optimizer: Optimizer) -> None:
    """Run a step of an optimizer, or none if `skip`, a boolean `[]` on the device, is true.

    The decision is made on the device: `GradScaler.step` would wait for it, save for torch's fused optimizers. Numbers
    that an optimizer keeps on the CPU (the step count of adamw8bit) advance in skipped steps, too.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
        optimizer.step()
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:  # state that is created in a skipped step is that of a zero gradient
        parameter.grad.copy_(torch.where(skip, 0.0, parameter.grad))
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    changed = [*(parameter.data for parameter in parameters), *states]
    before = [tensor.clone() for tensor in changed]
    optimizer.step()
    for tensor, old in zip(changed, before, strict=True):
        tensor.copy_(torch.where(skip, old, tensor))


def rate_of(optimizer: Optimizer, group: dict[str, Any]) -> float | torch.Tensor:
    """Return the learning rate of a group; for Prodigy, times its current estimate: a tensor `[]` on the device."""
    rate: float = group["lr"]
    estimate = optimizer.state[group["params"][0]].get("d")
    return rate if estimate is None else rate * estimate


def make_optimizers(name: str, groups: Sequence[dict[str, Any]]) -> list[Optimizer]:
    """Return the optimizers of parameter groups, in order.

    - adamw: of torch.
    - adamw8bit: AdamW with 8-bit moments (Dettmers et al. 2022).
    - prodigy: estimates the learning rate; `lr` is a factor of it (Mishchenko and Defazio 2024). There is one optimizer
      per group, so that each has its own estimate and factor. safeguard_warmup follows the advice of the library for
      diffusion models; its other advice, bias correction, would delay the estimate by about a hundred steps.
    - schedule_free: AdamW evaluated at an average of its iterates (Defazio et al. 2024).

    Args:
        name: of the optimizer.
        groups: torch parameter groups with `params`, the peak `lr`, and a decoupled `weight_decay`.

    Raises:
        InputError: the name is unknown.
    """
    match name:
        case "adamw":
            return [torch.optim.AdamW(groups, fused=True)]
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return [AdamW8bit(groups)]
        case "prodigy":
            from dreamartist_pipeline.core.unsynced_optimizers import UnsyncedProdigy

            return [UnsyncedProdigy([group], lr=group["lr"], safeguard_warmup=True) for group in groups]
        case "schedule_free":
            from dreamartist_pipeline.core.unsynced_optimizers import UnsyncedScheduleFree

            optimizer = UnsyncedScheduleFree(groups)
            optimizer.train()
            return [optimizer]
    raise InputError(
        expected=f"an optimizer among adamw, {', '.join(LIBRARIES)}", got=f"{name!r}", remedy="correct optimizer"
    )
