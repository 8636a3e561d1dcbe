"""Optimizers by name: torch's AdamW, and those of libraries that are needed only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dreamartist_pipeline.errors import InputError

LIBRARIES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def check_optimizer(name: str, device: torch.device) -> None:
    """Confirm that an optimizer can run here.

    Raises:
        InputError: its library is not installed, or it needs a GPU and `device` is none.
    """
    if name == "adamw8bit" and device.type != "cuda":
        raise InputError(
            expected="a CUDA GPU, because optimizer adamw8bit runs on nothing else",
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
    """Move parameters into one flat tensor; they and their gradients become views of it and of its gradient.

    Hundreds of small tensors cost more to update than to train.
    """
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    views = zip(parameters, torch.split(flat.data, sizes), torch.split(flat.grad, sizes), strict=True)
    for parameter, values, gradient in views:
        parameter.data = values.view(parameter.shape)
        parameter.grad = gradient.view(parameter.shape)
    return flat


def make_optimizers(name: str, groups: Sequence[dict[str, Any]]) -> list[Optimizer]:
    """Return the optimizers of some parameters; their parameter groups are `groups`, in order.

    adamw: torch's. adamw8bit: with moments of 8 bits (Dettmers et al. 2022). prodigy (Mishchenko and Defazio 2024)
    finds the rate by itself, and `lr` is a factor of it; an optimizer per group, so that each has an estimate of
    its own and factors may differ; safeguarded for warm-up, as the library advises for diffusion models (its other
    advice, bias correction, holds the estimate back for the first hundred steps: too long here). schedule_free: AdamW
    whose evaluation point is an average (Defazio et al. 2024).

    Args:
        name: of the optimizer.
        groups: torch's parameter groups with `params`, the peak `lr`, and a decoupled `weight_decay`.

    Raises:
        InputError: an unknown name.
    """
    match name:
        case "adamw":
            return [torch.optim.AdamW(groups, fused=True)]
        case "adamw8bit":
            return [_from_library(name, "AdamW8bit", "bitsandbytes.optim")(groups)]
        case "prodigy":
            prodigy = _from_library(name, "Prodigy")
            return [prodigy([group], lr=group["lr"], safeguard_warmup=True) for group in groups]
        case "schedule_free":
            optimizer = _from_library(name, "AdamWScheduleFree")(groups)
            optimizer.train()
            return [optimizer]
    raise InputError(
        expected=f"an optimizer among adamw, {', '.join(LIBRARIES)}", got=f"{name!r}", remedy="correct optimizer"
    )


def _from_library(name: str, attribute: str, module: str | None = None) -> Callable[..., Any]:
    from importlib import import_module

    factory: Callable[..., Any] = getattr(import_module(module or LIBRARIES[name]), attribute)
    return factory
