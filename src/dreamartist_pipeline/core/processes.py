"""Several processes that do one work: each has a GPU, or some threads of the CPU, of its own.

They are started here, without torchrun. Rank 0 is the calling process: it alone logs, saves and reacts to Ctrl-C. The
other ranks send results and errors to it, and print nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dreamartist_pipeline.errors import InputError, TrainingError

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import TCPStore

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
_Tasks = Callable[[int], Iterator[Any]]  # rank -> results of its part of the work

_HOST = "127.0.0.1"
_TIMEOUT = timedelta(days=7)  # of a collective call, so that a training can be suspended
_POLL_S = 0.2
_REPORT_S = 5.0  # until a rank that ended has reported its error
_WORTH_STARTING_S = 20.0  # about what a process needs to start and to load a model
_END_S = 30.0  # until a rank that has finished has ended
_KILLED = -9  # exit code, by SIGKILL
_READY, _RESULT, _DONE, _ERROR = "ready", "result", "done", "error"


# ------------------------------------------------------------------------------------------------- within a group


def rank() -> int:
    """Return the rank of this process; 0 outside a process group."""
    import torch.distributed as dist

    return dist.get_rank() if _has_group() else 0


def num_ranks() -> int:
    """Return the number of processes in the group; 1 outside one."""
    import torch.distributed as dist

    return dist.get_world_size() if _has_group() else 1


def rows_of_rank(num_rows: int) -> slice:
    """Return the rows of a batch that this rank computes; the shares differ by one row at most."""
    index, count = rank(), num_ranks()
    return slice(num_rows * index // count, num_rows * (index + 1) // count)


def sum_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Replace tensors by their sums over all ranks, in one all-reduce; does nothing outside a process group.

    All tensors have the same dtype. The sums have the same bits on every rank.
    """
    import torch
    import torch.distributed as dist

    if not _has_group():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def on_any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Return whether the flag is set on any rank; a collective call, with tensors on `device`, that waits for it."""
    import torch
    import torch.distributed as dist

    if num_ranks() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def _has_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


# ------------------------------------------------------------------------------------------------- starting


def run_on_processes(work: Callable[..., _Result], num_processes: int, *args: Any, on_gpus: bool = False) -> _Result:
    """Call `work(*args)` on every process of a group and return the result of rank 0, which is this process.

    Args:
        work: a module-level function.
        num_processes: 1 calls it directly.
        args: picklable; tensors are shared.
        on_gpus: whether rank r computes on the CUDA GPU r. The group then has the backend nccl, otherwise gloo.

    Raises:
        InputError: processes cannot be started, or one was ended from outside.
        Exception: the first error on any rank; all ranks are ended. Errors of other libraries on a rank above 0 are
            RuntimeErrors with their traceback.
    """
    if num_processes == 1:
        return work(*args)
    store = _store(0, num_processes)
    group = _Group(store.port, num_processes, on_gpus)
    tasks = functools.partial(_run_in_group, group, work, args)
    with _shared_threads(num_processes), _started(num_processes, tasks) as workers:
        watch = _Watch(workers, group)
        watch.start()
        try:
            with group.joined(0, store), watch.first_error():
                result = work(*args)
            watch.join(_END_S)
        finally:
            watch.stop()
        if watch.error:
            raise watch.error
        return result


def spread(
    work: Callable[..., Iterator[_Result]], parts: Sequence[_Part], num_processes: int, *args: Any
) -> Iterator[_Result]:
    """Yield one result per part, in order; each is computed by one of the processes, without a group.

    The first is computed by this process alone, and no other is started if the rest would take it less than 20 s too.

    Args:
        work: a module-level generator function: `work(rank, parts of this rank, *args)` yields one result per part.
        parts: of the work, picklable.
        num_processes: at most; no more than parts are started.
        args: picklable; tensors are shared.

    Raises:
        InputError: processes cannot be started, or one was ended from outside.
        Exception: as in `run_on_processes`.
    """
    if num_processes == 1 or not parts:
        yield from work(0, parts, *args)
        return
    started_s = time.monotonic()
    first = next(work(0, parts[:1], *args))
    seconds = time.monotonic() - started_s
    yield first
    rest = parts[1:]
    count = min(num_processes, len(rest))
    if count <= 1 or seconds * len(rest) < _WORTH_STARTING_S:
        yield from work(0, rest, *args)
        return
    tasks = functools.partial(_run_share, work, [rest[rank::count] for rank in range(count)], args)
    with _shared_threads(count), _started(count, tasks) as workers:
        own = tasks(0)
        for index in range(len(rest)):
            yield workers[index % count - 1].receive() if index % count else next(own)


def _store(port: int, num_processes: int) -> TCPStore:
    """Return a connection to the store by which the ranks find each other; port 0 opens one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch documents it there

    return TCPStore(_HOST, port, num_processes, is_master=port == 0, wait_for_workers=False)


def _run_in_group(group: _Group, work: Callable[..., Any], args: tuple[Any, ...], rank: int) -> Iterator[Any]:
    """Run the work of a rank above 0, without results; its error is sent before other ranks see it leave the group."""
    with group.joined(rank):
        try:
            work(*args)
        except KeyboardInterrupt:  # a requested stop, which rank 0 reports
            return
        except Exception as error:
            yield _to_send(error, rank)
            raise


def _run_share(
    work: Callable[..., Iterator[Any]], shares: Sequence[Sequence[Any]], args: tuple[Any, ...], rank: int
) -> Iterator[Any]:
    return work(rank, shares[rank], *args)


@contextlib.contextmanager
def _shared_threads(num_processes: int) -> Iterator[None]:
    """Let each process have its part of the threads; the other processes take theirs when they start."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // num_processes))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Group:
    """A process group that the ranks join.

    Attributes:
        port: of the store by which the ranks find each other; rank 0 has it.
        size: number of ranks.
        on_gpus: see `run_on_processes`.
    """

    port: int
    size: int
    on_gpus: bool

    @contextlib.contextmanager
    def joined(self, rank: int, store: TCPStore | None = None) -> Iterator[None]:
        """Join the group, and destroy it with its threads afterwards.

        An optimizer's first step imports torch.distributed.nn, whose functions have the current default group as a
        default argument. A group referenced in this way outlives its destruction, and its threads can abort the process
        at exit. Importing the module before the group exists avoids the reference.
        """
        import torch
        import torch.distributed as dist
        import torch.distributed.nn

        if self.on_gpus:
            torch.cuda.set_device(rank)
        store = store or _store(self.port, self.size)
        backend = "nccl" if self.on_gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=self.size, timeout=_TIMEOUT)
        try:
            yield
        except BaseException:
            self.abort()  # destroying it would wait for a collective call that never ends
            raise
        finally:
            dist.destroy_process_group()

    def abort(self) -> None:
        """End the collective calls of this process, which with nccl would wait for a failed rank; gloo's end alone."""
        import torch.distributed as dist

        if self.on_gpus and dist.is_initialized():
            dist.distributed_c10d._get_default_group().abort()


# ------------------------------------------------------------------------------------------------- the processes


class _Worker:
    """A process of a rank above 0."""

    def __init__(self, rank: int, tasks: _Tasks) -> None:
        """Start the process."""
        import torch
        import torch.multiprocessing as mp  # shares tensors instead of copying them

        context = mp.get_context("spawn")
        self.rank = rank
        self.connection, sender = context.Pipe(duplex=False)
        arguments = (sender, rank, tasks, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        sender.close()  # so that the end of the process ends the connection

    def receive(self) -> Any:
        """Return the next result; None after the last.

        Raises:
            InputError: the process has ended.
            Exception: its error.
        """
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise InputError(
                expected=f"all processes to finish their work, of which rank {self.rank} is one",
                got=f"its end with exit code {code}" + (" (killed)" if code == _KILLED else ""),
                remedy="if the system ended it because memory was exhausted, lower device.processes",
            ) from None
        if kind == _ERROR:
            raise value
        return value

    def wait_until_ready(self) -> None:
        """Wait until the process has started.

        Raises:
            InputError: it ended before.
        """
        try:
            self.receive()
        except InputError as error:
            raise InputError(
                expected=f"a second process that starts (device.processes), as rank {self.rank}",
                got=error.got,
                remedy="in a script, put the calls under `if __name__ == '__main__':`; where no process can be "
                "started, as in some interactive sessions, set device.processes=1",
            ) from error

    def end(self, is_finished: bool) -> None:
        """End the process, if it has not ended by itself."""
        self._process.join(_END_S if is_finished else 0)
        self._process.terminate()
        self._process.join(_REPORT_S)
        self._process.kill()
        self.connection.close()


@contextlib.contextmanager
def _started(num_processes: int, tasks: _Tasks) -> Iterator[list[_Worker]]:
    """Start the ranks above 0 and wait until they are ready; end them afterwards.

    Raises:
        InputError: they cannot be started.
    """
    if multiprocessing.current_process().daemon:
        raise InputError(
            expected=f"a process that can start {num_processes - 1} more (device.processes)",
            got="a daemonic process, which cannot",
            remedy="set device.processes=1, or run it in a process of its own",
        )
    workers: list[_Worker] = []
    is_finished = False
    try:
        with _interrupt_ignored():
            workers.extend(_Worker(rank, tasks) for rank in range(1, num_processes))
        for worker in workers:
            worker.wait_until_ready()
        yield workers
        is_finished = True
    finally:
        for worker in workers:
            worker.end(is_finished)


@contextlib.contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """Ignore Ctrl-C while processes start, which inherit this: it reaches all processes, and only rank 0 reacts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class _Watch(threading.Thread):
    """Waits for the ends of all workers beside the work of rank 0.

    Attributes:
        has_failed: set once a worker has failed.
        error: of that worker.
    """

    def __init__(self, workers: Sequence[_Worker], group: _Group) -> None:
        super().__init__(daemon=True)
        self._workers, self._group = {worker.connection: worker for worker in workers}, group
        self.has_failed = threading.Event()
        self.error: BaseException | None = None
        self._is_over = threading.Event()

    def stop(self) -> None:
        """End the thread, so that the workers can be ended."""
        self._is_over.set()
        self.join()

    def run(self) -> None:
        """Wait until all have finished, or one has failed."""
        while self._workers and not self._is_over.is_set():
            for connection in wait(list(self._workers), _POLL_S):
                try:
                    self._workers.pop(connection).receive()  # type: ignore[call-overload]
                except (InputError, RuntimeError) as error:
                    self.error = error
                    self.has_failed.set()
                    self._group.abort()
                    return

    @contextlib.contextmanager
    def first_error(self) -> Iterator[None]:
        """Raise the error of a worker in place of that of a collective call, which follows from it."""
        try:
            yield
        except RuntimeError:
            if self.has_failed.wait(_REPORT_S) and self.error:
                raise self.error from None
            raise


def _serve(sender: Connection, rank: int, tasks: _Tasks, num_threads: int) -> None:
    """Run a rank above 0, and send its results and its end, or its error."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # removes semaphores, unlike the default
    logging.disable()
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 # until the process ends
    torch.set_num_threads(num_threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send((_READY, None))
        for result in tasks(rank):
            sender.send((_ERROR if isinstance(result, Exception) else _RESULT, result))
        sender.send((_DONE, None))
    except Exception as error:  # noqa: BLE001 # rank 0 raises it
        sender.send((_ERROR, _to_send(error, rank)))


def _end_with_parent() -> None:
    """End this process when rank 0 has ended, by whatever cause: a collective call would wait for it forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _to_send(error: Exception, rank: int) -> Exception:
    """Return an error that can be sent to another process: of another library, as a RuntimeError with its traceback."""
    if isinstance(error, InputError | TrainingError):
        return error
    return RuntimeError(f"{error} (rank {rank})\n{traceback.format_exc()}")
