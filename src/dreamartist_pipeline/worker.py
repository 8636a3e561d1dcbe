"""A process that executes runs of this project one after another: `python -m dreamartist_pipeline.worker`.

Imports and the base model stay in memory from one run to the next. Standard input has a request per run, one line of
JSON: arguments of `kedro run`, variables of the environment, and the file for what the run prints. Standard output has
an answer to each: exit status, and the memory of this process after it. The end of standard input stops a run as
SIGTERM does, and ends the process.
"""

from __future__ import annotations

import gc
import io
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil


def main() -> None:
    """Answer requests until the input ends."""
    requests, replies = _own_channels()  # before imports, which may print
    import dreamartist_pipeline.__main__  # noqa: F401 - Kedro without what it logs when it is imported

    # isort: split
    from kedro.framework.startup import bootstrap_project
    from kedro.utils import find_kedro_project

    if project := find_kedro_project(Path.cwd()):
        bootstrap_project(project)
    received = _Requests(requests)
    with suppress(KeyboardInterrupt):  # Ctrl-C between two runs
        while (request := received.next()) is not None:
            status = _execute(**request)
            received.answered()
            gc.collect()
            print(json.dumps({"status": status, "memory_bytes": _memory_bytes()}), file=replies, flush=True)


def _own_channels() -> tuple[io.FileIO, TextIO]:
    """Return standard input and output, and leave an empty input and stderr to the runs."""
    requests, replies = io.FileIO(os.dup(0)), os.fdopen(os.dup(1), "w", encoding="utf-8")
    with Path(os.devnull).open("rb") as empty:
        os.dup2(empty.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


class _Requests:
    """Requests as they arrive; after the last one, SIGTERM is sent to the main thread unless all are answered."""

    def __init__(self, stream: io.FileIO) -> None:
        self._stream = stream
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._open = 0
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """Wait for the next one; None at their end."""
        return self._waiting.get()

    def answered(self) -> None:
        """Note that one is answered."""
        self._open -= 1

    def _read(self) -> None:
        while line := self._stream.readline():
            self._open += 1
            self._waiting.put(json.loads(line))
        self._waiting.put(None)
        from dreamartist_pipeline.cli.stopping import signal_main_thread

        if self._open:
            signal_main_thread(signal.SIGTERM)


def _execute(arguments: list[str], environment: Mapping[str, str | None], log: str) -> int:
    """Execute `kedro run`, and return its exit status."""
    from dreamartist_pipeline.__main__ import main as run

    _reset_peak_memory()
    with _printing_to(Path(log)), _environment(environment), _command_line(["kedro", "run", *arguments]):
        try:
            status = run(arguments, prog_name="kedro run")
        except SystemExit as ended:
            status = ended.code
        except BaseException:  # noqa: BLE001 - it ends this run, and not this process
            sys.excepthook(*sys.exc_info())
            status = 1
    return status if isinstance(status, int) else int(status is not None)


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Append all that is printed to a file."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with log.open("ab") as output:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, previous in enumerate(kept, start=1):
            os.dup2(previous, descriptor)
            os.close(previous)


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Change the environment, and undo all changes afterwards."""
    before = dict(os.environ)
    try:
        for name, value in changes.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


def _reset_peak_memory() -> None:
    """Let the peak of the resident memory be that of the next run, where the system can do so (proc(5))."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory_bytes() -> int:
    """Return the memory of this process, resident and on GPUs."""
    torch = sys.modules.get("torch")
    on_gpus = 0
    if torch is not None and torch.cuda.is_initialized():
        on_gpus = sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))
    return int(psutil.Process().memory_info().rss + on_gpus)


if __name__ == "__main__":
    main()
