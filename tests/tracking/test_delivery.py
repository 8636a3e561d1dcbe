"""Delivery to a store that fails, with a store of the test."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreamartist_pipeline.tracking import delivery
from dreamartist_pipeline.tracking.delivery import Delivery, is_loud, optional, quiet, reason_of, send_all
from dreamartist_pipeline.tracking.outbox import Outbox, Record
from small_disks import mount_read_only, mount_small


class RefusedError(Exception):
    """What MLflow never takes."""

    error_code = "INVALID_PARAMETER_VALUE"


class Store:
    """Takes records, or raises `failure`."""

    def __init__(self) -> None:
        self.taken: list[Record] = []
        self.failure: Exception | None = None
        self.tries = 0

    def __call__(self, record: Record) -> None:
        self.tries += 1
        if self.failure is not None:
            raise self.failure
        self.taken.append(record)

    @property
    def tags(self) -> dict[str, str]:
        return {each.content["key"]: each.content["value"] for each in self.taken if each.kind == "tag"}


def tag(name: str, value: str = "x") -> Record:
    return Record("tag", {"key": name, "value": value})


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def kept(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox" / "0123")


@pytest.fixture
def sent(store: Store, kept: Outbox) -> Delivery:
    return Delivery(SimpleNamespace(), {"store": "s"}, kept, store)


def eventually(condition: Callable[[], Any]) -> bool:
    until_s = time.monotonic() + 10
    while time.monotonic() < until_s and not condition():
        time.sleep(0.01)
    return bool(condition())


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again after 20 ms."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE_S", 0.05)


def test_records_go_straight_to_a_store_that_takes_them(sent: Delivery, store: Store, kept: Outbox) -> None:
    sent.deliver(tag("a"))
    sent.close()
    assert store.taken == [tag("a")]
    assert not kept.folder.exists()


def test_after_a_failure_nothing_waits_for_the_store_again(sent: Delivery, store: Store, kept: Outbox) -> None:
    store.failure = ConnectionError("away")
    for name in "abc":
        sent.deliver(tag(name))
    assert store.tries == 1
    assert list(kept) == [tag("a"), tag("b"), tag("c")]


@pytest.mark.usefixtures("soon")
def test_a_store_that_answers_again_gets_everything_once_in_order(
    sent: Delivery, store: Store, kept: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    store.failure = ConnectionError("away")
    sent.deliver(tag("a", "1"))
    sent.deliver(tag("a", "2"))
    store.failure = None
    assert eventually(lambda: not sent.is_away)
    sent.deliver(tag("a", "3"))
    sent.close()
    assert store.taken == [tag("a", "1"), tag("a", "1"), tag("a", "2"), tag("a", "3")]  # the first is tried alone
    assert not kept.folder.exists()
    assert [each.levelname for each in caplog.records].count("WARNING") == 1


def test_what_is_missing_at_the_end_is_kept_and_tagged_and_told(
    sent: Delivery, store: Store, kept: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    store.failure = ConnectionError("away")
    sent.deliver(Record("batch", {"metrics": [{}, {}], "parameters": {}, "tags": {}}))
    sent.close()
    sent.deliver(Record("status", {"status": "FINISHED"}))
    sent.report()
    batch, mark, status = list(kept)
    assert mark.content["value"].startswith("incomplete: 2 metrics")
    assert (batch.kind, status.content["status"]) == ("batch", "FINISHED")
    assert str(kept.folder) in caplog.messages[-1] and "away" in caplog.messages[-1]


def test_files_that_find_no_place_do_not_keep_numbers_back(
    tmp_path: Path, kept: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[Record] = []

    def full(record: Record) -> None:
        if record.kind == "file":
            raise OSError(28, "No space left on device")
        taken.append(record)

    (tmp_path / "a.png").touch()
    sent = Delivery(SimpleNamespace(), {}, kept, full)
    sent.deliver(Record("file", {"file": str(tmp_path / "a.png"), "path": ""}))
    sent.deliver(tag("a"))
    sent.close()
    assert [each.content["key"] for each in taken] == ["a", "delivery"]
    assert "1 file" in taken[-1].content["value"]


def test_a_kept_file_that_someone_removes_keeps_no_other_back(tmp_path: Path) -> None:
    (tmp_path / "b.png").touch()
    records = [Record("file", {"file": str(tmp_path / name), "path": ""}) for name in ("a.png", "b.png")]

    def copy(record: Record) -> None:
        Path(record.content["file"]).read_bytes()

    left = send_all(records, copy, time.monotonic() + 60)
    assert (left.left, left.waiting) == (records[:1], set())


def test_what_mlflow_refuses_does_not_stop_the_others(sent: Delivery, store: Store, kept: Outbox) -> None:
    store.failure = RefusedError("another value")
    sent.deliver(tag("a"))
    store.failure = None
    sent.deliver(tag("b"))
    sent.close()
    assert [each.content["key"] for each in store.taken] == ["b", "delivery"]
    assert list(kept) == [tag("a")]


def test_a_run_goes_on_when_nothing_can_be_kept_either(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    sent = Delivery(SimpleNamespace(), {}, Outbox(tmp_path / "file" / "0123"), store)
    store.failure = ConnectionError("away")
    sent.deliver(tag("a"))
    sent.deliver(tag("b"))
    sent.report()
    assert sent.missing() == {"tags": 2}
    assert "neither in MLflow nor kept" in caplog.messages[-1]


@pytest.mark.parametrize("mount", [mount_read_only, partial(mount_small, size="4k")], ids=["read-only", "full"])
def test_a_run_goes_on_when_the_outbox_has_no_place(
    store: Store, tmp_path: Path, mount: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    store.failure = ConnectionError("away")
    with mount(tmp_path / "outbox") as folder:
        with suppress(OSError):
            (folder / "other").write_bytes(bytes(2**16))
        sent = Delivery(SimpleNamespace(), {}, Outbox(folder / "0123"), store)
        sent.deliver(tag("a"))
        assert sent.missing() == {"tags": 1}


def test_the_end_does_not_wait_for_a_store_that_never_answers(kept: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "CLOSING_S", 0.2)
    answer = threading.Event()
    sent = Delivery(SimpleNamespace(), {}, kept, lambda _: answer.wait(20))
    sent.hurry()
    worker = threading.Thread(target=sent.deliver, args=(tag("a"),), daemon=True)
    worker.start()
    time.sleep(0.25)
    began_s = time.monotonic()
    for name in "bcd":
        sent.deliver(tag(name))  # late: kept at once
    sent.close()
    assert time.monotonic() - began_s < 1
    assert [each.content["key"] for each in list(kept)][:3] == ["b", "c", "d"]
    answer.set()


def test_the_log_lines_of_mlflow_are_dropped_while_it_is_called() -> None:
    record = logging.LogRecord("mlflow.store.db.utils", logging.ERROR, "", 0, "failed", (), None)
    own = logging.LogRecord("dreamartist_pipeline.x", logging.ERROR, "", 0, "failed", (), None)
    assert is_loud(record)
    with quiet():
        assert not is_loud(record)
        assert is_loud(own)


def test_a_read_that_fails_is_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with optional("the parent"):
        raise ConnectionError("http://user:pa55word@host is away")
    assert caplog.messages == ["Left out the parent: http://***@host is away"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("HTTPConnectionPool(…): [Errno 111] Connection refused'))", "connection refused"),
        ("", "ValueError"),
        ("a\nb", "a"),
    ],
)
def test_reasons_are_short(text: str, reason: str) -> None:
    assert reason_of(ValueError(text)) == reason


def test_a_long_reason_is_cut() -> None:
    assert len(reason_of(ValueError("x" * 1000))) == 160
