"""Modules that are kept off the device while they are not used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def off_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Keep modules in the memory of the CPU within this context; without effect if the device is the CPU."""
    _move(modules, torch.device("cpu"))
    try:
        yield
    finally:
        _move(modules, device)


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move modules to the device within this context, and afterwards back to where they were."""
    places = [next(module.parameters()).device for module in modules]
    _move(modules, device)
    try:
        yield
    finally:
        for module, place in zip(modules, places, strict=True):
            module.to(place)


def _move(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device)
