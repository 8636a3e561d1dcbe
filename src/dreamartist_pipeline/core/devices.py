"""Whether the configured device exists."""

from __future__ import annotations

from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ON_CPU, DeviceParams


def check_device(params: DeviceParams, planned: PlannedConcept | None = None) -> None:
    """Check that there is a GPU if one is required.

    A training with the settings of conf/sd15 takes days on a CPU: one row took 11.6 s of CPU time to pass through a
    UNet of Stable Diffusion 1.5 at 512 px, and 200 images of 20 steps, together with 1000 steps of 5 rows in two
    branches and a backward pass of twice the cost, are 38,000 passes.

    Raises:
        InputError: `cuda` without a GPU.
    """
    if params.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            expected="a CUDA GPU (device.device=cuda)",
            got="none that torch sees",
            remedy=f"use a machine with a GPU and torch's CUDA build, or add {ON_CPU} to --params; on a CPU, an image "
            "of 512 px takes minutes and a training at 512 px takes days",
        )
