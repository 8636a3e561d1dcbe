"""How many processes share the rows of a step."""

from __future__ import annotations

from dreamartist_pipeline.core.devices import num_processes
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, TrainingParams


def num_training_processes(params: TrainingParams, device: DeviceParams) -> int:
    """Return the number of processes of a training; `auto` is at most one per row.

    A CUDA graph is not recorded beside the threads of NCCL: nobody has tried it.

    Raises:
        InputError: more processes than rows, several with CUDA graphs, or see `check_device`.
    """
    num_rows = params.batch_size + params.regularization_batch_size
    count = num_processes(device)
    if device.processes == "auto":
        return 1 if params.backend == "cudagraph" else min(count, num_rows)
    if count > num_rows:
        raise InputError(
            expected=f"at most one process per row of a step, {num_rows} (training.batch_size={params.batch_size}, "
            f"training.regularization_batch_size={params.regularization_batch_size})",
            got=f"device.processes={count}",
            remedy="lower device.processes, or raise training.batch_size",
        )
    if count > 1 and params.backend == "cudagraph":
        raise InputError(
            expected="one process, because training.backend=cudagraph requires it",
            got=f"device.processes={count}",
            remedy="set training.backend to eager or compile, or device.processes=1",
        )
    return count
