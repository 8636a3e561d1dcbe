"""End a run by Ctrl-C or SIGTERM: what it has begun is closed, and the user reads what is kept."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

_KEPT = "What has been finished is kept; the same command goes on from there."
_UNWINDING_S = 5.0
_AT_ONCE_S = 0.1
_CLOSING = "Stopping: the run is being closed."


class Stop:
    """Whether this process was asked to stop.

    Attributes:
        name: of the signal; None without one.
        is_closing: whether the interruption has ended the run, which is being closed.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_closing = False
        self._arrived_s: float | None = None
        self._again = threading.Timer(0, lambda: None)

    @property
    def message(self) -> str:
        """What the user reads."""
        return f"Stopped by {self.name or 'an interruption'}. {_KEPT}"

    def interrupt(self, number: int, _frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt at the first signal; later ones do not disturb what is being closed.

        If the run still goes on after some seconds, a library has caught the interruption, as while modules are
        imported or garbage is collected: it is raised again.
        """
        if self._arrived_s is not None and (self.is_closing or time.monotonic() - self._arrived_s < _UNWINDING_S):
            click.echo(_CLOSING, err=True)
            return
        self._arrived_s = time.monotonic()
        self.name = signal.Signals(number).name
        self._raise_again(number, _UNWINDING_S)
        raise KeyboardInterrupt(self.message)

    def _raise_again(self, number: int, after_s: float) -> None:
        self._again.cancel()
        self._again = threading.Timer(after_s, signal_main_thread, [number])
        self._again.daemon = True
        self._again.start()

    def lost(self, lost: sys.UnraisableHookArgs) -> bool:
        """Raise the interruption again at once if it is what was raised where Python ignores it, as in a destructor.

        Returns:
            Whether it is: there is nothing to be read then.
        """
        if self.name is None or not issubclass(lost.exc_type, KeyboardInterrupt):
            return False
        if not self.is_closing:
            self._arrived_s = None
            self._raise_again(signal.Signals[self.name], _AT_ONCE_S)
        return True

    def close(self) -> None:
        """Let nothing be raised any more, while the run is closed."""
        self.is_closing = True
        self._again.cancel()


def signal_main_thread(number: int) -> None:
    """Send a signal to the main thread, which ends a call of the system there."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """Let SIGTERM (docker stop, Slurm, systemd) and SIGINT (Ctrl-C) end what runs within.

    Within the steps of a training, both wait for the end of a step, see `core.checkpoints.stop_requests`. A library may
    turn the interruption into an error of its own: ask `Stop.name`.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield stop
        return
    previous = {number: signal.signal(number, stop.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    report_ignored = sys.unraisablehook
    sys.unraisablehook = lambda ignored: None if stop.lost(ignored) else report_ignored(ignored)
    try:
        yield stop
    finally:
        stop.close()
        sys.unraisablehook = report_ignored
        for number, handler in previous.items():
            signal.signal(number, handler)
