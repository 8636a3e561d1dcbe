"""Locks between processes: one run at a time changes what a lock protects, and others are told who holds it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import psutil
from filelock import FileLock, Timeout

from dreamartist_pipeline.errors import InputError

_POLL_S = 0.1
_COMMAND_CHARACTERS = 300
_TEXT_START = 1  # Windows lets no other process read the first byte of a lock file while it is locked
_READ_TRIES, _READ_PAUSE_S = 10, 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        process: its id.
        host: the machine or container it runs on.
        since: local time with time zone, ISO 8601.
        command: its command line.
    """

    process: int
    host: str
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        """Describe this process as the holder from now on."""
        command = f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}"
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(os.getpid(), platform.node(), since, command[:_COMMAND_CHARACTERS])

    def __str__(self) -> str:
        place = "" if self.host == platform.node() else f" on {self.host}"
        return f"process {self.process}{place} since {self.since} ({self.command})"


class LockHeldError(InputError):
    """Another process holds a lock."""


class Lock(Protocol):
    """An exclusive lock of something that several processes may change."""

    def hold(self, wait_s: float = 0) -> AbstractContextManager[None]:
        """Hold the lock within a `with` statement; it is released at the end, or by the death of the process.

        Args:
            wait_s: how long to wait for it at most; the first wait is logged.

        Raises:
            LockHeldError: another one holds it; the message says what is protected, who holds it and since when.
        """


@dataclass(frozen=True)
class LocalLock:
    """A `Lock` between processes that share a file system.

    The operating system releases it when a process ends in any way, so a lock file that stays behind means nothing. It
    is never removed: others may be waiting for it. It names the latest holder, for messages.

    Attributes:
        file: the lock file; its folder is created.
        protects: what is locked, in messages, such as "the subject fox".
    """

    file: Path
    protects: str

    @contextmanager
    def hold(self, wait_s: float = 0) -> Iterator[None]:
        """See `Lock.hold`.

        Raises:
            LockHeldError: another process holds it after `wait_s`.
            OSError: the lock file cannot be created or written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.file, thread_local=False)
        self._acquire(lock, wait_s)
        try:
            self._describe(json.dumps(asdict(Holder.this_process())))
            yield
        finally:
            with contextlib.suppress(OSError):  # of a full disk
                self._describe("")
            lock.release()

    def _acquire(self, lock: FileLock, wait_s: float) -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait_s:
                limit = timedelta(seconds=round(wait_s))
                log.info("Waiting up to %s for %s, which %s uses.", limit, self.protects, self._named_holder())
            try:
                lock.acquire(timeout=wait_s, poll_interval=_POLL_S)
            except Timeout:
                raise LockHeldError(
                    expected=f"{self.protects}, unused by other runs",
                    got=f"in use by {self._named_holder()}",
                    remedy="wait until it has finished, or end it",
                ) from None

    def _named_holder(self) -> str:
        for _ in range(_READ_TRIES):
            if (holder := self._read()) is not None and _may_live(holder):
                return str(holder)
            time.sleep(_READ_PAUSE_S)  # acquired, but not described yet; or by then released
        return f"another process (lock file {self.file})"

    def _describe(self, text: str) -> None:
        with self.file.open("r+b", buffering=0) as opened:
            opened.truncate(_TEXT_START)
            opened.seek(_TEXT_START)
            opened.write(text.encode())

    def _read(self) -> Holder | None:
        try:
            with self.file.open("rb", buffering=0) as opened:
                opened.seek(_TEXT_START)
                values = json.loads(opened.read())
            return Holder(**{each.name: values[each.name] for each in fields(Holder)})
        except (OSError, ValueError, LookupError, TypeError):
            return None


def _may_live(holder: Holder) -> bool:
    """Return whether a process runs, as far as it can be known: those of other machines may."""
    return holder.host != platform.node() or psutil.pid_exists(holder.process)
