"""The configured device: whether it exists, what it can compute with, and its free memory."""

from __future__ import annotations

import logging
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ON_CPU, DeviceParams

if TYPE_CHECKING:
    import torch

_KINDS = {"cuda": "a CUDA GPU", "mps": "the GPU of a Mac", "xpu": "an Intel GPU"}

log = logging.getLogger(__name__)


def check_device(params: DeviceParams, planned: PlannedConcept | None = None) -> None:
    """Check that the configured device exists, and the library for `quantize`.

    A training with the settings of conf/sd15 takes days on a CPU: one row took 11.6 s of CPU time to pass through a
    UNet of Stable Diffusion 1.5 at 512 px, and 200 images of 20 steps, together with 1000 steps of 5 rows in two
    branches and a backward pass of twice the cost, are 38,000 passes.

    Raises:
        InputError: there is no such device or library, or no device of its own for every process.
    """
    if params.quantize != "none" and find_spec("torchao") is None:
        raise InputError(
            expected=f"the library torchao for device.quantize={params.quantize}",
            got="no such library",
            remedy="run: pip install torchao",
        )
    _check_exists(params)
    _check_processes(params)


def _check_exists(params: DeviceParams) -> None:
    if params.device in ("auto", "cpu"):
        return
    import torch

    kind, _, number = params.device.partition(":")
    if kind == "mps":
        num_devices = int(torch.backends.mps.is_available())
    else:
        num_devices = getattr(torch, kind).device_count() if getattr(torch, kind).is_available() else 0
    if not num_devices:
        raise InputError(
            expected=f"{_KINDS[kind]} (device.device={params.device})",
            got="none that torch sees",
            remedy=f"use a machine with a GPU and torch's CUDA build, or add {ON_CPU} to --params; on a CPU, an image "
            "of 512 px takes minutes and a training at 512 px takes days",
        )
    if int(number or 0) >= num_devices:
        raise InputError(
            expected=f"{kind}:0 to {kind}:{num_devices - 1} (device.device={params.device})",
            got=f"{num_devices} device{'s' if num_devices > 1 else ''}",
            remedy="choose one of them",
        )


def pick_device(params: DeviceParams) -> torch.device:
    """Return the device; `auto` is the GPU if there is one.

    Raises:
        InputError: there is no such device.
    """
    import torch

    check_device(params)
    if params.device != "auto":
        return torch.device(params.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def _check_processes(params: DeviceParams) -> None:
    """Check that there are as many GPUs as processes, and what they need to compute as one."""
    if params.processes in ("auto", 1):
        return
    import torch

    if params.device == "cpu" or (params.device == "auto" and not torch.cuda.is_available()):
        if not torch.distributed.is_available():
            raise InputError(
                expected=f"torch.distributed (device.processes={params.processes})",
                got="a build of torch without it",
                remedy="set device.processes=1",
            )
    elif params.processes > _usable_gpus():  # type: ignore[operator] # mypy does not exclude "auto"
        raise InputError(
            expected=f"a CUDA GPU for each process (device.processes={params.processes})",
            got=f"{_usable_gpus()} that can compute together; NCCL is {'' if _has_nccl() else 'not '}available",
            remedy="lower device.processes, or set device.device=cpu",
        )


def num_processes(params: DeviceParams) -> int:
    """Return the number of processes that share one work; `auto` is one per GPU, and one on the CPU.

    Raises:
        InputError: see `check_device`.
    """
    check_device(params)
    if params.processes != "auto":
        return params.processes
    return max(1, _usable_gpus()) if params.device in ("auto", "cuda") else 1


def _usable_gpus() -> int:
    """Return the number of CUDA GPUs that can compute together."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count() if _has_nccl() else 1


def _has_nccl() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_nccl_available()


def device_of_rank(params: DeviceParams, rank: int) -> DeviceParams:
    """Return the parameters of one of several processes; rank 0 has the device that one process alone would have."""
    if rank == 0 or pick_device(params).type != "cuda":
        return params
    return params.model_copy(update={"device": f"cuda:{rank}", "processes": 1})


def pick_dtype(params: DeviceParams, device: torch.device) -> torch.dtype:
    """Return the dtype of the base model: float16 for bfloat16 on a CUDA GPU without it, such as T4 or RTX 20."""
    import torch

    dtype: torch.dtype = getattr(torch, params.dtype)
    if dtype == torch.bfloat16 and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                log.warning("%s has no bfloat16: float16 is used instead.", torch.cuda.get_device_name(device))
                return torch.float16
    return dtype


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


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process: allocated on a GPU, resident on the CPU; None if it is unknown."""
    import torch

    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).max_memory_allocated(device))
    if device.type == "mps" or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure the peak memory of a GPU anew."""
    import torch

    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def empty_cache(device: torch.device) -> None:
    """Return the memory of a GPU that is allocated, but not used."""
    import torch

    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def processor_name() -> str:
    """Return the processor's name where /proc has it, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] != "unknown" else platform.machine()


def machine_class(params: DeviceParams) -> dict[str, str]:
    """Return what of a machine can change the last bits of a result: operating system, device, threads."""
    import torch

    device = pick_device(params)
    name = processor_name() if device.type == "cpu" else device.type
    if device.type in ("cuda", "xpu"):
        name = str(torch.get_device_module(device).get_device_name(device))
    system = f"{platform.system()} {platform.machine()}"
    return {"system": system, "device": name, "threads": str(torch.get_num_threads())}
