"""Deliver what a run records to MLflow, whatever MLflow does: what it does not take is kept and delivered later.

A run never waits twice for a store that does not answer: after the first failure everything is kept in the outbox, and
a thread of its own tries again from time to time. What is left at the end of the run is delivered by the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.redaction import redact
from dreamartist_pipeline.tracking.outbox import Outbox, Record, described

DELIVERY_TAG = "delivery"
"""Tag of a run whose records were not all delivered: `incomplete: …`, and `complete: …` once they are."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0  # between two tries
CLOSING_S = 30.0
"""How long the end of a run waits for MLflow; a request that is under way by then may take its own time limit more."""
_REFUSALS = {  # MLflow's codes for what no later try can change
    *("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"),
    *("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"),  # of a server without registered models
}

_CAUSES = {
    "Connection refused": "connection refused",
    "timed out": "no answer in time",
    "timeout exception": "no answer in time",
    "Connection reset": "connection reset",
    "RemoteDisconnected": "connection closed without an answer",
    "Name or service not known": "no host of that name",
    "No route to host": "no route to the host",
    "Network is unreachable": "network unreachable",
    "database is locked": "the database is locked",
}
"""Part of a message -> how it is reported."""
_REASON_CHARACTERS = 160

Send = Callable[[Record], None]
log = logging.getLogger(__name__)
_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


class Delivery:
    """The records of one run on their way to MLflow.

    Attributes:
        run: as it began.
        failure: the last reason why something was not delivered; None if all was.
    """

    def __init__(self, run: Any, about: Mapping[str, Any], outbox: Outbox, send: Send) -> None:
        self.run = run
        self.failure: str | None = None
        self._about, self._outbox, self._send = about, outbox, send
        self._away: set[str] = set()  # of "store" and "files": which of them does not answer
        self._lock = threading.RLock()
        self._lost: Counter[str] = Counter()
        self._wake = threading.Event()
        self._retries: threading.Thread | None = None
        self._closes_at_s: float | None = None

    @property
    def is_away(self) -> bool:
        """Whether the store did not answer the last time."""
        return "store" in self._away or self._is_late()

    def deliver(self, record: Record) -> None:
        """Send a record, or keep it. It never raises: the run goes on without MLflow."""
        with self._lock:
            if _lanes(record) & self._away or self._is_late():
                self._keep(record)
                return
        if (failure := attempt(self._send, record)) is not None:
            with self._lock:
                self._keep(record)
                self._set_away(record, failure)

    def close(self) -> None:
        """Try for the last time to deliver what is kept, and tag the run if something is left."""
        with self._lock:
            self._closes_at_s = min(self._closes_at_s or float("inf"), time.monotonic() + CLOSING_S)
            retries = self._retries
        self._wake.set()
        if retries is not None:
            retries.join(CLOSING_S)
        if missing := self.missing():
            self.deliver(
                Record("tag", {"key": DELIVERY_TAG, "value": f"incomplete: {described(missing)} not delivered"})
            )

    def report(self) -> None:
        """Log what is left."""
        if not (missing := self.missing()):
            return
        kept = missing - self._lost
        if kept:
            log.warning(
                "MLflow has not taken %s of this run (%s). They are kept in %s; the next run delivers them.",
                *(described(kept), self.failure, self._outbox.folder),
            )
        if self._lost:
            log.warning("%s of this run are neither in MLflow nor kept (%s).", described(self._lost), self.failure)

    def missing(self) -> Counter[str]:
        """Return what is not delivered, by kind."""
        with self._lock:
            return self._outbox.counts() + self._lost

    def hurry(self) -> None:
        """Let no record wait for MLflow from CLOSING_S on: the run ends."""
        with self._lock:
            self._closes_at_s = time.monotonic() + CLOSING_S

    def _is_late(self) -> bool:
        return self._closes_at_s is not None and time.monotonic() > self._closes_at_s

    def _keep(self, record: Record) -> None:
        try:
            self._outbox.append(record, self._about)
        except (OSError, InputError) as error:
            if not self._lost:
                log.warning("Cannot keep what MLflow does not take: %s. The run goes on.", error)
            self._lost += record.counted()
            self.failure = self.failure or str(error)

    def _set_away(self, record: Record, failure: BaseException) -> None:
        """Note a failure, and start the thread that tries again, except for what MLflow refuses for ever."""
        if self.failure is None:
            log.warning(
                "MLflow does not take %s: %s. The run goes on; what is missing is kept in %s.",
                *(described(record.counted()), reason_of(failure), self._outbox.folder),
            )
        self.failure = reason_of(failure)
        if is_refusal(failure):
            return
        self._away.add(_lane(record))
        if self._retries is None or not self._retries.is_alive():
            self._retries = threading.Thread(target=self._retry, name="MLflowRetries", daemon=True)
            self._retries.start()

    def _retry(self) -> None:
        """Deliver what is kept, with pauses, until all of it is delivered or the run ends."""
        pause_s, is_last = FIRST_PAUSE_S, False
        while self._away and not is_last:
            is_last = self._wake.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if self._answers():
                self._deliver_kept()

    def _deliver_kept(self) -> None:
        with self._lock:
            records = list(self._outbox)
        deadline_s = self._closes_at_s if self._closes_at_s is not None else time.monotonic() + LONGEST_PAUSE_S
        sent = send_all(records, self._send, deadline_s)
        with self._lock:
            added = list(self._outbox)[len(records) :]
            with suppress(OSError, InputError):  # all stay in it then, and arrive twice
                self._outbox.replace([*sent.left, *added])
            self._away &= sent.waiting | {_lane(record) for record in added}
            if not self.missing():
                log.info("MLflow answers again; nothing is missing.")
                self.failure = None

    def _answers(self) -> bool:
        """Return whether one of what did not answer takes the first record that waits for it."""
        with self._lock:
            firsts = [next((record for record in self._outbox if _lane(record) == lane), None) for lane in self._away]
        failures = [attempt(self._send, record) for record in firsts if record is not None]
        return any(failure is None or is_refusal(failure) for failure in failures)


@dataclass
class Sent:
    """What became of records.

    Attributes:
        left: those that are not delivered, in their order.
        reason: why the last of them failed; None without a failure.
        waiting: what did not answer, of "store" and "files"; MLflow refuses all others that are left.
    """

    left: list[Record] = field(default_factory=list)
    reason: str | None = None
    waiting: set[str] = field(default_factory=set)


def send_all(records: Collection[Record], send: Send, deadline_s: float) -> Sent:
    """Send records in their order until the deadline; what does not answer once is not tried again."""
    sent = Sent()
    for record in records:
        if time.monotonic() > deadline_s:
            sent.waiting.add(_lane(record))
        if _lanes(record) & sent.waiting:
            sent.left.append(record)
        elif (failure := attempt(send, record)) is not None:
            sent.left.append(record)
            sent.reason = reason_of(failure)
            if not is_refusal(failure):
                sent.waiting.add(_lane(record))
    return sent


def attempt(send: Callable[..., Any], *args: Any) -> Exception | None:
    """Call what talks to MLflow, and return its error.

    MLflow, requests, SQLAlchemy and the clients of object stores raise errors without a common class.
    """
    try:
        with quiet():
            send(*args)
    except Exception as error:  # noqa: BLE001 - see above
        return error
    return None


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Leave out what reads from MLflow when it does not answer, and log that."""
    try:
        with quiet():
            yield
    except Exception as error:  # noqa: BLE001 - see `attempt`
        log.warning("Left out %s: %s", what, reason_of(error))


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the log lines and tracebacks of MLflow and its libraries: an error that is raised is reported once."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def is_loud(record: logging.LogRecord) -> bool:
    """Return whether a log record is to be printed: a filter for handlers."""
    return not (_is_quiet.get() and record.name.split(".")[0] in {"mlflow", "urllib3", "sqlalchemy", "alembic"})


def is_refusal(error: BaseException) -> bool:
    """Return whether no later try can succeed: a parameter with another value, a file that someone has removed."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in _REFUSALS


def reason_of(error: BaseException) -> str:
    """Return why MLflow has not done something: the cause that requests and urllib3 wrap, or else the first line."""
    text = str(error).strip()
    for part, cause in _CAUSES.items():
        if part in text:
            return cause
    line = redact(next(iter(text.splitlines()), "")) or type(error).__name__
    return line if len(line) <= _REASON_CHARACTERS else f"{line[: _REASON_CHARACTERS - 1]}…"


def _lanes(record: Record) -> set[str]:
    """Return what takes a record: the store, or where the server has its files. One can fail without the other."""
    return {"store", "files"} if record.kind == "model" else {_lane(record)}


def _lane(record: Record) -> str:
    """Return which of them is taken to fail with a record: of a model, most is files."""
    return "files" if record.kind in ("file", "model") else "store"
