"""What is found out about a tracking store before a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.tracking import servers
from dreamartist_pipeline.tracking.servers import check_store, within
from mlflow_servers import Gate, answering, free_port
from refusals import says


@pytest.fixture
def gate() -> Iterator[Gate]:
    opened = Gate(free_port())
    yield opened
    opened.set("closed")


def refusal_of(uri: str) -> InputError:
    with pytest.raises(InputError) as raised:
        check_store(uri)
    assert "pa55word" not in str(raised.value)
    assert "MLFLOW_TRACKING" in raised.value.remedy
    return raised.value


def test_a_server_that_is_not_there_is_named(gate: Gate) -> None:
    gate.set("closed")
    error = refusal_of(gate.uri)
    assert f"http://127.0.0.1:{gate.port}" in error.expected
    assert "refused" in error.got


def test_a_server_that_never_answers_is_given_up_in_time(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PROBE_S", 0.3)
    gate.set("silent")
    began_s = time.monotonic()
    assert "no answer" in refusal_of(gate.uri).got
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_password_names_the_variables(status: int) -> None:
    with answering(status, b"You are not authenticated") as uri:
        error = refusal_of(uri)
    assert str(status) in error.got and "not authenticated" in error.got
    assert "MLFLOW_TRACKING_PASSWORD" in error.remedy and "MLFLOW_TRACKING_TOKEN" in error.remedy


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>hello</html>"), (200, b'{"hello": 1}'), (200, b"[]"), (404, b"not found"), (500, b"oops")],
)
def test_what_is_no_mlflow_is_told(status: int, body: bytes) -> None:
    with answering(status, body) as uri:
        error = refusal_of(uri)
    assert f"status {status}" in error.got and body.decode() in error.got


def test_a_server_without_experiments_is_one() -> None:
    with answering(200, b"{}") as uri:
        check_store(uri)


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "file:///tmp/mlruns", "/tmp/mlruns", "htp://user:pa55word@host"])
def test_a_folder_and_an_unknown_scheme_are_refused(uri: str) -> None:
    assert "sqlite:///" in refusal_of(uri).expected


def test_a_folder_is_left_to_users_who_insist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_store((tmp_path / "mlruns").as_uri())


def test_a_database_without_its_driver_or_server_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 6)  # a little longer than we wait
    refusal_of("postgresql://user:pa55word@127.0.0.1:1/db")
    for thread in threading.enumerate():
        if thread.name == "within":  # until it ends, it holds a lock that later tests need
            thread.join()


def test_the_database_of_the_project_is_checked(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, check=says(expected="mlflow.db", got="not a database")):
        check_store(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_call_that_takes_too_long_is_left_behind() -> None:
    began_s = time.monotonic()
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(20))
    assert time.monotonic() - began_s < 5
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
