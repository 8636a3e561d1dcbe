"""What earlier runs of this project have left: undelivered records, and runs that a kill left RUNNING.

The process of a run holds a lock in `data/09_tracking/running`, from before the run exists until it is closed. The run
is created with the name of the lock as a tag. A lock that can be taken belongs to a process that has ended, also on
another machine that shares the folder. Copies of the folder have files of other inodes: they say nothing of a server.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.locks import Holder, LocalLock, LockHeldError
from dreamartist_pipeline.redaction import without_credentials
from dreamartist_pipeline.tracking.databases import database_file
from dreamartist_pipeline.tracking.delivery import DELIVERY_TAG, Sent, optional, send_all
from dreamartist_pipeline.tracking.outbox import Outbox, described
from dreamartist_pipeline.tracking.stores import (
    PROCESS_TAG,
    begin_delivery,
    end_delivery,
    expect_no_run,
    expect_run,
    sender_to,
)
from dreamartist_pipeline.whole_files import written_whole

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REPLAY_S = 30.0
"""How long the start of a run takes at most for what earlier runs have left; the rest waits for the next."""

log = logging.getLogger(__name__)


class LeftRuns:
    """The runs of one project in one tracking store.

    Attributes:
        outbox: folder of what is not delivered.
    """

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        """Refer to a project's tracking folder.

        Args:
            folder: of tracking; absolute.
            tracking_uri: the current store.
        """
        self.outbox, self._running = folder / "outbox", folder / "running"
        self._finishing = LocalLock(folder / "earlier_runs.lock", "what earlier runs have left for MLflow")
        self._store = store_name(tracking_uri, folder)
        self._is_local = database_file(tracking_uri) is not None
        self._lock: _RunLock | None = None
        self._run_id: str | None = None

    def finish(self, client: MlflowClient, experiment_id: str) -> None:
        """Deliver what earlier runs have kept, and close those whose process has ended.

        Another run that does the same at this moment is left to it.
        """
        deadline_s = time.monotonic() + REPLAY_S
        with suppress(LockHeldError, OSError), self._finishing.hold():
            for outbox in self._outboxes():
                with optional(f"the delivery of {outbox.folder}"):
                    self._deliver(client, outbox, deadline_s)
            for lock in self._ended():
                with optional(f"closing the run of {lock.file}"):
                    self._close(client, experiment_id, lock)

    def announce(self, experiment_id: str | None = None) -> None:
        """Take the lock of the next run, and deliver its records, or keep them, from when it is opened.

        `experiment_id` is that of the run; None: that of the run which closes it after a kill.
        """
        name = uuid.uuid4().hex[:12]
        lock = _RunLock(self._running / f"{name}.lock")
        try:
            if lock.take():
                lock.describe(self._store, experiment_id)
                self._lock = lock
        except (OSError, InputError) as error:
            log.warning("If this run is killed, MLflow shows it as running: %s", error)
        expect_run({} if self._lock is None else {PROCESS_TAG: name}, self._begin)

    def _begin(self, run: Run) -> None:
        from mlflow import MlflowClient

        self._run_id = run.info.run_id
        about = {"store": self._store, "run_id": run.info.run_id, "run_name": run.info.run_name}
        lock = None if self._lock is None else self._lock.file
        begin_delivery(run, about | {"lock": lock and lock.name}, self.outbox)
        if lock is not None and run.data.tags.get(PROCESS_TAG) != lock.stem:  # a run that is continued
            MlflowClient().set_tag(run.info.run_id, PROCESS_TAG, lock.stem)

    def end(self) -> None:
        """Let go of the lock: the run is closed."""
        expect_no_run()
        if self._run_id is not None:
            end_delivery(self._run_id)
            self._run_id = None
        if self._lock is not None:
            self._lock.remove()
            self._lock = None

    def _outboxes(self) -> Iterator[Outbox]:
        """Yield those of this store whose process has ended; others are named."""
        for folder in sorted(self.outbox.glob("*/run.json")):
            outbox = Outbox(folder.parent)
            try:
                about = outbox.about()
            except (OSError, ValueError) as error:
                log.warning("Cannot read what a run has not delivered, in %s: %s", outbox.folder, error)
                continue
            if about.get("store") != self._store:
                log.warning("%s waits for a run that records in %s.", outbox.folder, about.get("store"))
            elif not self._is_held(about.get("lock")):
                yield outbox

    def _is_held(self, name: str | None) -> bool:
        if name is None or not (self._running / name).exists():
            return False
        lock = _RunLock(self._running / name)
        if not lock.take():
            return True
        lock.release()
        return False

    def _deliver(self, client: MlflowClient, outbox: Outbox, deadline_s: float) -> None:
        records, counts = list(outbox), outbox.counts()
        run = client.get_run(outbox.run_id)
        sent = send_all(records, sender_to(run), deadline_s)
        outbox.replace(sent.left)
        name = f"{run.info.run_name} ({run.info.run_id})"
        if sent.left:
            self._report(outbox, name, sent)
            tag = f"incomplete: {described(outbox.counts())} not delivered"
        else:
            log.info("Delivered what an earlier run has kept for MLflow: %s of %s.", described(counts), name)
            tag = f"complete: {described(counts)} delivered later"
        client.set_tag(outbox.run_id, DELIVERY_TAG, tag)

    @staticmethod
    def _report(outbox: Outbox, name: str, sent: Sent) -> None:
        missing = described(outbox.counts())
        if sent.waiting:
            log.warning("%s of %s wait in %s: %s.", missing, name, outbox.folder, sent.reason or "no time was left")
        else:
            log.warning(
                "MLflow refuses %s of %s (%s). They stay in %s, which can be removed.",
                *(missing, name, sent.reason, outbox.folder),
            )

    def _ended(self) -> Iterator[_RunLock]:
        """Yield the locks of this store whose process has ended."""
        for file in sorted(self._running.glob("*.lock")):
            lock = _RunLock(file)
            if not lock.take():
                continue
            if lock.is_of(self._store, self._is_local):
                yield lock
            else:
                lock.release()

    def _close(self, client: MlflowClient, experiment_id: str, lock: _RunLock) -> None:
        experiments, name = [lock.experiment_id or experiment_id], lock.file.stem
        runs = client.search_runs(experiments, f"tags.{PROCESS_TAG} = '{name}'", max_results=10)
        for run in (run for run in runs if run.info.status == "RUNNING"):
            client.set_tag(run.info.run_id, "error", f"killed: {lock.holder} ended without closing the run")
            client.set_terminated(run.info.run_id, "KILLED")
            log.warning("Closed the run %s, which a kill had left running.", run.info.run_name)
        lock.remove()


class _RunLock:
    """The lock of one run's process, and a text beside it that outlives the process."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._held = ExitStack()

    def take(self) -> bool:
        """Return whether the lock is held from now on; False if another process holds it."""
        try:
            self._held.enter_context(LocalLock(self.file, "a run").hold())
        except LockHeldError:
            return False
        return True

    def describe(self, store: str, experiment_id: str | None) -> None:
        """Write where the run is, who holds the lock, and the file's inode, which copies do not have."""
        inode, holder = self.file.stat().st_ino, str(Holder.this_process())
        facts = {"store": store, "experiment_id": experiment_id, "inode": inode, "holder": holder}
        with written_whole(self._text) as file:
            file.write_text(json.dumps(facts, indent=1), encoding="utf-8")

    def is_of(self, store: str, is_local: bool) -> bool:
        """Return whether the run was in this store; a copied folder has copies of local stores only."""
        facts = self._facts()
        if facts.get("store") != store:
            return False
        return is_local or facts.get("inode") == self.file.stat().st_ino

    @property
    def experiment_id(self) -> str | None:
        """The experiment of the run; None if it is not written down."""
        return self._facts().get("experiment_id")

    @property
    def holder(self) -> str:
        """Who has held the lock."""
        return str(self._facts().get("holder", "its process"))

    def release(self) -> None:
        """Let go of the lock."""
        self._held.close()

    def remove(self) -> None:
        """Let go of the lock, and remove it: no other process waits for the lock of a run."""
        self.release()
        self._text.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)

    def _facts(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads(self._text.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts

    @property
    def _text(self) -> Path:
        return self.file.with_suffix(".json")


def store_name(tracking_uri: str, folder: Path) -> str:
    """Return a store's name without credentials; the database of a project has the same one wherever the project is."""
    file = database_file(tracking_uri)
    if file is not None and file.is_relative_to(folder):  # it moves with the project
        return f"sqlite:///{file.relative_to(folder).as_posix()}"
    return without_credentials(tracking_uri)
