"""One function on several processes: on a CPU, two one-thread processes train small models faster than two threads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

_PATIENCE = timedelta(days=7)  # of a process with the others, so that a training can be suspended for a while


def run_on_processes(work: Callable[..., Any], num_processes: int, *args: Any) -> Any:
    """Call `work(*args)` on every process of a gloo group and return what rank 0, this process, returns.

    Args:
        work: a module-level function; its arguments must be picklable, tensors are shared.
        num_processes: 1 calls it directly.
    """
    import torch
    import torch.multiprocessing as mp

    if num_processes == 1:
        return work(*args)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        others = [
            mp.get_context("spawn").Process(
                target=_join_and_work, args=(work, rank, num_processes, meeting, args), daemon=True
            )
            for rank in range(1, num_processes)
        ]
        for process in others:
            process.start()
        try:
            return _join_and_work(work, 0, num_processes, meeting, args)
        finally:
            for process in others:
                process.join(timeout=30)
                process.terminate()
            torch.set_num_threads(threads)


def _join_and_work(work: Callable[..., Any], rank: int, num_processes: int, meeting: str, args: tuple[Any, ...]) -> Any:
    import signal

    import torch

    if rank > 0:  # Ctrl-C reaches every process; rank 0 takes its checkpoint first and then ends the others
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with _process_group(meeting, rank, num_processes):
        return work(*args)


@contextmanager
def _process_group(meeting: str, rank: int, num_processes: int) -> Iterator[None]:
    """Be a member of a gloo group that is gone, with its threads, afterwards.

    torch.distributed.nn's functions have the group of their import's time as a default argument, and an optimizer's
    first step imports them. A group held that way outlives its destruction, and now and then a thread of it that finds
    the interpreter gone aborts the process. Imported before the group exists, they hold none.
    """
    import torch.distributed as dist
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_processes, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
