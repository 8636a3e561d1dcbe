"""Run a function on several processes: two one-thread processes train small models faster than two threads of one."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

_TIMEOUT = timedelta(days=7)  # of a collective call, so that a training can be suspended


def run_on_processes(work: Callable[..., Any], num_processes: int, *args: Any) -> Any:
    """Call `work(*args)` on every process of a gloo group and return the result of rank 0, which is this process.

    Args:
        work: a module-level function.
        num_processes: 1 calls it directly.
        args: picklable; tensors are shared.
    """
    import torch
    import torch.multiprocessing as mp

    if num_processes == 1:
        return work(*args)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        init_method = (Path(folder) / "init").as_uri()
        workers = [
            mp.get_context("spawn").Process(
                target=_run_worker, args=(work, rank, num_processes, init_method, args), daemon=True
            )
            for rank in range(1, num_processes)
        ]
        for worker in workers:
            worker.start()
        try:
            return _run_rank(work, 0, num_processes, init_method, args)
        finally:
            for worker in workers:
                worker.join(timeout=30)
                worker.terminate()
            torch.set_num_threads(threads)


def _run_worker(work: Callable[..., Any], rank: int, *group: Any) -> None:
    """Run a rank above 0, silently on a requested stop, which rank 0 reports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; only rank 0 reacts
    with contextlib.suppress(KeyboardInterrupt):
        _run_rank(work, rank, *group)


def _run_rank(work: Callable[..., Any], rank: int, num_processes: int, init_method: str, args: tuple[Any, ...]) -> Any:
    import torch

    torch.set_num_threads(1)
    with _process_group(init_method, rank, num_processes):
        return work(*args)


@contextlib.contextmanager
def _process_group(init_method: str, rank: int, num_processes: int) -> Iterator[None]:
    """Join a gloo group, and destroy it with its threads afterwards.

    An optimizer's first step imports torch.distributed.nn, whose functions have the current default group as a default
    argument. A group referenced in this way outlives its destruction, and its threads can abort the process at exit.
    Importing the module before the group exists avoids the reference.
    """
    import torch.distributed as dist
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=num_processes, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
