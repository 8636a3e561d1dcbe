"""When a training saves its complete state, and when it stops early; where the state is kept is up to the caller."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

_SAVING_SHARE = 0.05  # of the time, at most, is spent on checkpoints

Checkpoint = dict[str, Any]
CONCEPT = "concept"
"""Name of the checkpoints of a concept's training."""


class Checkpoints(Protocol):
    """The checkpoints of trainings, by name."""

    def load(self, name: str) -> Checkpoint | None:
        """Return the latest checkpoint of a training, or None."""

    def save(self, name: str, checkpoint: Checkpoint) -> None:
        """Store a checkpoint as the latest of a training."""

    def discard(self, name: str) -> None:
        """Remove all checkpoints of a training."""


class Pauses:
    """Tells between two steps whether a checkpoint is due, and whether the training stops early, in this process.

    Args:
        stop_requested: see `stop_requests`.
        checkpoint_minutes: between two checkpoints; 0 for one after every step.
        max_minutes: from now on, after which the training stops; None for no limit.
    """

    def __init__(
        self, stop_requested: Callable[[], bool], checkpoint_minutes: float, max_minutes: float | None = None
    ) -> None:
        self._stop_requested, self._shortest_s = stop_requested, 60 * checkpoint_minutes
        self._every_s = self._shortest_s
        self._saved_s = time.monotonic()
        self._end_s = None if max_minutes is None else self._saved_s + 60 * max_minutes

    @property
    def is_over(self) -> bool:
        """Whether `max_minutes` have passed."""
        return self._end_s is not None and time.monotonic() >= self._end_s

    def stops(self) -> bool:
        """Return whether the training stops, by a signal or because its minutes are over."""
        return self._stop_requested() or self.is_over

    def checkpoint_is_due(self) -> bool:
        """Return whether the last checkpoint is old enough."""
        return time.monotonic() - self._saved_s >= self._every_s

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save a checkpoint within, and count the minutes to the next from then on; slow ones are rarer."""
        started = time.monotonic()
        yield
        self._saved_s = time.monotonic()
        if self._shortest_s:
            self._every_s = max(self._shortest_s, (self._saved_s - started) / _SAVING_SHARE)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGINT or SIGTERM arrived; within, they have no other effect.

    Outside the main thread, which alone receives signals, it always returns False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    arrived = threading.Event()
    previous = {number: signal.signal(number, lambda *_: arrived.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
