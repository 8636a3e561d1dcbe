"""Objects and locks in a store, in memory and in a real S3-like server."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.locks import LockHeldError
from dreamartist_pipeline.object_stores import ObjectStore, StoreLock
from mlflow_servers import free_port
from refusals import says
from remote_servers import bucket

_SILENT_S = 1.0


@pytest.fixture(scope="module", params=["memory", "s3"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a folder in each kind of store."""
    if request.param == "memory":
        yield f"memory://{secrets.token_hex(4)}"
        return
    pytest.importorskip("s3fs")
    with bucket("studio") as url:
        yield url


@pytest.fixture
def store(address: str) -> ObjectStore:
    """A folder of its own that does not exist yet."""
    return ObjectStore(address).folder("sets", secrets.token_hex(4))


def lock(store: ObjectStore) -> StoreLock:
    return StoreLock(store, "a.lock", "the share", _SILENT_S)


def test_objects_are_written_read_listed_and_removed(store: ObjectStore) -> None:
    assert (store.names(), store.read("a.png")) == (set(), None)
    store.write("a.png", b"first")
    store.write("a.png", b"second")
    store.folder("inner").write("b.png", b"")
    assert (store.names(), store.read("a.png")) == ({"a.png"}, b"second")
    store.remove("a.png")
    store.remove("a.png")
    assert (store.names(), store.read("a.png")) == (set(), None)


def test_of_two_writers_of_a_new_object_one_succeeds(store: ObjectStore) -> None:
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"


def test_a_lock_that_is_held_names_its_holder_and_is_free_afterwards(store: ObjectStore) -> None:
    with (
        lock(store).hold(),
        pytest.raises(LockHeldError, check=says(expected="the share", got="in use by process")),
        lock(store).hold(),
    ):
        pass
    assert store.names() == set()
    with lock(store).hold():
        assert store.names() == {"a.lock"}


def test_a_lock_is_kept_for_longer_than_the_silence_of_the_dead(store: ObjectStore) -> None:
    with lock(store).hold():
        end_s = time.monotonic() + 3 * _SILENT_S
        other = lock(store)
        while time.monotonic() < end_s:
            with pytest.raises(LockHeldError), other.hold():
                pass
            time.sleep(_SILENT_S / 10)


def test_the_lock_of_a_holder_that_is_silent_is_taken_over(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.write("a.lock", b'{"process": 7, "host": "far", "command": "kedro run", "token": "x"}')
    with lock(store).hold(wait_s=20):
        assert "process 7 on far (kedro run) is silent" in caplog.text
    assert store.names() == set()


def test_a_lock_that_another_one_has_taken_over_is_left_to_it(store: ObjectStore) -> None:
    with lock(store).hold():
        store.write("a.lock", b'{"token": "of another"}')
        time.sleep(_SILENT_S)
    assert store.read("a.lock") == b'{"token": "of another"}'


def test_waiting_ends_when_the_holder_releases_the_lock(store: ObjectStore) -> None:
    held, order = threading.Event(), []

    def first() -> None:
        with lock(store).hold():
            held.set()
            time.sleep(_SILENT_S / 2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with lock(store).hold(wait_s=20):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("data/sets", "no address of a store"),
        ("nosuch://studio/sets", "nosuch"),
    ],
)
def test_an_address_of_no_known_store_is_refused(url: str, got: str) -> None:
    with pytest.raises(InputError, check=says(expected=url, got=got)):
        ObjectStore(url)


def test_a_store_that_does_not_answer_is_named_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    with bucket("studio"), pytest.raises(InputError, check=says(expected="s3://another")):
        ObjectStore("s3://another/folder").write("a", b"")
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, check=says(got="127.0.0.1", remedy="check address, credentials and network")):
        ObjectStore("s3://studio/sets").names()
