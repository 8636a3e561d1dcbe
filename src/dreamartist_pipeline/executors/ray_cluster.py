"""Workers on the machines of a Ray cluster, or of one that is started on this machine (https://docs.ray.io)."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.executors.local import ATTEMPTS, PROGRAM, LocalWorkers
from dreamartist_pipeline.starting_runs import RunCommand

LOCAL = "local"
"""In place of an address: a cluster on this machine, which ends with this process."""
WAITING = "waiting for a worker"
"""Name of threads."""
_AUTO = "auto"  # in place of an address, by Ray: the cluster that this machine belongs to
_FORWARDED = ("MLFLOW_", "AWS_", "GOOGLE_", "AZURE_", "HF_", "FSSPEC_", "DREAMARTIST_")  # prefixes of variables
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_POLL_S = 1.0
_LONG_S = 60
_CLOSING_S, _ENDING_S = 180.0, 30.0
_CONNECTING_S = 10.0

log = logging.getLogger(__name__)


class RayWorkers:
    """Executes commands in Ray actors: one per GPU, or as many as asked for.

    Each actor has a worker process. A lost actor (its process or machine) is started again by Ray, on another machine
    if necessary; its command is executed again by whichever actor is free first, as the one that is lost may find no
    place any more. All machines need the project at the same path, such as on a shared file system.

    Args:
        address: of the cluster (`HEAD:6379`, `ray://HEAD:10001`), `auto` on one of its machines, or `local`.
        count: how many actors; None for one per GPU of the cluster, or one.
        threads: of each run; None for as many as it takes by itself.
        program: of a worker process.

    Raises:
        InputError: Ray is not installed, or there is no cluster at that address.
    """

    def __init__(
        self,
        address: str,
        count: int | None = None,
        threads: int | None = None,
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        self._ray = _connect(address)
        num_gpus = int(self._ray.cluster_resources().get("GPU", 0))
        self.num_workers = count or num_gpus or 1
        options = {
            "num_cpus": 0 if num_gpus else min(threads or 1, _most_cpus(self._ray)),
            "num_gpus": min(num_gpus, 1),
        }
        actor = self._ray.remote(_Host).options(
            max_restarts=-1, max_task_retries=0, max_concurrency=3, scheduling_strategy="SPREAD", **options
        )
        self._free: queue.Queue[Any] = queue.Queue()
        self._alive: set[Any] = set()
        self._is_closed = threading.Event()
        self._calls = _Calls()
        self._actors = [actor.remote(program) for _ in range(self.num_workers)]
        for one in self._actors:
            self._free_when_alive(one)

    def run(self, command: RunCommand) -> str | None:
        """Execute one command; see `Executor.run`."""
        self._calls.begin()
        try:
            return self._run(command)
        finally:
            self._calls.end()

    def _run(self, command: RunCommand) -> str | None:
        forwarded = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
        command = replace(command, environment=forwarded | dict(command.environment))
        for _ in range(ATTEMPTS):
            actor = self._take()
            if actor is None:
                return "not started"
            try:
                message: str | None = self._ray.get(actor.run.remote(command))
            except self._ray.exceptions.RayTaskError as error:  # its program could not be started
                message = _last_line(error)
            except self._ray.exceptions.RayError as error:
                self._alive.discard(actor)
                self._free_when_alive(actor)
                if not self._is_closed.is_set():
                    log.warning("The worker of %s is lost: %s", command.name, type(error).__name__)
                continue
            self._free.put(actor)
            return message
        return f"its worker was lost {ATTEMPTS} times ({command.log})"

    def close(self) -> None:
        """End all actors; runs stop as they do at SIGTERM."""
        self._is_closed.set()
        closing = [actor.close.remote() for actor in self._alive]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSING_S)
        for actor in self._actors:
            self._ray.kill(actor)  # calls of it fail
        if self._calls.all_ended(_ENDING_S):
            self._ray.shutdown()  # otherwise, Ray does so at the end of the process

    def _take(self) -> Any:
        """Wait for an actor that is free; None once this is closed."""
        warned = False
        started_s = time.monotonic()
        while not self._is_closed.is_set():
            try:
                return self._free.get(timeout=_POLL_S)
            except queue.Empty:
                if not self._alive and not warned and time.monotonic() - started_s > _LONG_S:
                    log.warning("No machine of the cluster has had room for a worker for %d s; waiting.", _LONG_S)
                    warned = True
        return None

    def _free_when_alive(self, actor: Any) -> None:
        self._calls.begin()
        threading.Thread(target=self._await, args=[actor], name=WAITING, daemon=True).start()

    def _await(self, actor: Any) -> None:
        """Let an actor have commands once it has started."""
        try:
            while not self._is_closed.is_set():
                try:
                    self._ray.get(actor.is_ready.remote())
                except self._ray.exceptions.RayError:
                    self._is_closed.wait(_POLL_S)
                else:
                    self._alive.add(actor)
                    self._free.put(actor)
                    return
        finally:
            self._calls.end()


class _Calls:
    """Counts the threads that call Ray, because a shutdown during a call ends the process by SIGSEGV."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number = 0

    def begin(self) -> None:
        """Count one more."""
        with self._changed:
            self._number += 1

    def end(self) -> None:
        """Count one less."""
        with self._changed:
            self._number -= 1
            self._changed.notify_all()

    def all_ended(self, timeout_s: float) -> bool:
        """Wait until there is none, and return whether there is none."""
        with self._changed:
            return self._changed.wait_for(lambda: self._number == 0, timeout_s)


class _Host:
    """The actor: a worker process on the machine that Ray has chosen."""

    def __init__(self, program: tuple[str, ...]) -> None:
        self._workers = LocalWorkers(program=program)

    def is_ready(self) -> bool:
        """Answer once it is started."""
        return True

    def run(self, command: RunCommand) -> str | None:
        """Execute one command; see `Executor.run`."""
        if not command.folder.is_dir():
            return f"{_node()} has no folder {command.folder}: it needs the project at the same path"
        return self._workers.run(command)

    def close(self) -> None:
        """Stop what it executes."""
        self._workers.close()


def _connect(address: str) -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise InputError(
            expected="Ray, for runs on its workers",
            got=str(error),
            remedy="pip install 'dreamartist-pipeline[ray]', or leave --ray out",
        ) from error
    is_local = address == LOCAL
    try:
        if address not in (LOCAL, _AUTO):
            _check_reached(address)
        with _signals_kept():
            ray.init(
                address=None if is_local else address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({"include_dashboard": False} if is_local else {}),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            expected=f"a Ray cluster at {address}",
            got=_first_line(error),
            remedy=f"give the address of its head, such as HEAD:6379 ('{_AUTO}' on its machines) or ray://HEAD:10001 "
            f"elsewhere, or '{LOCAL}' for this machine alone",
        ) from error
    return ray


def _check_reached(address: str) -> None:
    """Connect to a head once, because Ray tries for minutes.

    Raises:
        OSError: nothing answers.
        ValueError: no HOST:PORT.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.hostname is None or url.port is None:
        raise ValueError(f"{address} is no HOST:PORT")
    with socket.create_connection((url.hostname, url.port), _CONNECTING_S):
        pass


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo that Ray handles SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _most_cpus(ray: Any) -> int:
    """Return the CPUs of the largest machine."""
    return max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)


def _node() -> str:
    import ray

    return f"the machine {ray.util.get_node_ip_address()}"


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
