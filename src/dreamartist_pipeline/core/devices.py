"""The configured device: whether it exists, and its free memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ON_CPU, DeviceParams

if TYPE_CHECKING:
    import torch


def check_device(params: DeviceParams, planned: PlannedConcept | None = None) -> None:
    """Check that there is a GPU if one is required.

    A training with the settings of conf/sd15 takes days on a CPU: one row took 11.6 s of CPU time to pass through a
    UNet of Stable Diffusion 1.5 at 512 px, and 200 images of 20 steps, together with 1000 steps of 5 rows in two
    branches and a backward pass of twice the cost, are 38,000 passes.

    Raises:
        InputError: `cuda` without a GPU.
    """
    import torch

    if params.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            expected="a CUDA GPU (device.device=cuda)",
            got="none that torch sees",
            remedy=f"use a machine with a GPU and torch's CUDA build, or add {ON_CPU} to --params; on a CPU, an image "
            "of 512 px takes minutes and a training at 512 px takes days",
        )


def free_memory_bytes(device: torch.device) -> int:
    """Return the memory that this process can use on a device, what it has allocated on a GPU included."""
    import psutil
    import torch

    match device.type:
        case "cuda":
            return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
        case "xpu":
            return int(torch.xpu.mem_get_info(device)[0] + torch.xpu.memory_reserved(device))
        case "mps":
            return int(torch.mps.recommended_max_memory())
    return int(psutil.virtual_memory().available)
