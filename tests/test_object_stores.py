"""Objects and locks in a store, in memory and in a real S3-like server."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.run import with_local_copies, with_paths_in
from dreamartist_pipeline.locks import LockHeldError
from dreamartist_pipeline.object_stores import ObjectStore, StoreLock, local_copy
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
        ("file:///data/sets", "folders of this machine are given as paths"),
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


# --------------------------------------------------------------------------------------------- copies on this machine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DREAMARTIST_CACHE", str(tmp_path))
    return tmp_path


def test_a_file_is_copied_once_and_again_when_it_has_changed(store: ObjectStore, cache: Path) -> None:
    store.write("fox.png", b"first")
    copies = [local_copy(f"{store.url}/fox.png") for _ in range(2)]
    assert copies[0] == copies[1] and Path(copies[0]).is_relative_to(cache)
    assert (Path(copies[0]).name, Path(copies[0]).read_bytes()) == ("fox.png", b"first")
    store.write("fox.png", b"another picture")
    assert Path(local_copy(f"{store.url}/fox.png")).read_bytes() == b"another picture"
    assert Path(copies[0]).read_bytes() == b"first"


def test_a_folder_is_copied_with_those_in_it(store: ObjectStore, cache: Path) -> None:
    store.folder("model").write("model_index.json", b"{}")
    store.folder("model", "unet").write("config.json", b"[]")
    folder = Path(local_copy(f"{store.url}/model/"))
    assert (folder.name, (folder / "unet/config.json").read_bytes()) == ("model", b"[]")
    assert {file.name for file in folder.iterdir()} == {"model_index.json", "unet"}
    assert local_copy(f"{store.url}/model") == str(folder)


def test_the_caption_beside_a_picture_is_copied_with_it(store: ObjectStore, cache: Path) -> None:
    store.write("fox.png", b"picture")
    store.write("fox.txt", b"white background")
    copy = Path(local_copy(f"{store.url}/fox.png"))
    assert copy.with_suffix(".txt").read_text() == "white background"
    store.write("fox.txt", b"snow, white background")
    copy = Path(local_copy(f"{store.url}/fox.png"))
    assert (copy.read_bytes(), copy.with_suffix(".txt").read_text()) == (b"picture", "snow, white background")


def test_a_folder_that_was_made_in_a_console_is_copied(store: ObjectStore, cache: Path) -> None:
    if store.url.startswith("memory"):
        pytest.skip("has folders of its own")
    store.write("pictures/", b"")
    store.folder("pictures").write("fox.png", b"")
    assert [file.name for file in Path(local_copy(f"{store.url}/pictures")).iterdir()] == ["fox.png"]


@pytest.mark.parametrize("name", ["../outside", "a/../../outside"])
def test_an_object_cannot_be_copied_to_elsewhere(
    store: ObjectStore, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {f"{store._root}/folder/{name}": {"size": 1}}
    monkeypatch.setattr(store._files, "find", lambda *_, **__: found)
    with pytest.raises(InputError, check=says(got="outside")):
        local_copy(f"{store.url}/folder")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("code", ["PreconditionFailed", "ConditionalRequestConflict"])
def test_answers_of_other_stores_to_a_conditional_write_are_understood(
    store: ObjectStore, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer(Exception):
        response: ClassVar = {"Error": {"Code": code}}

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(22, "of the condition") from Answer()

    monkeypatch.setattr(store._files, "pipe_file", refuse)
    assert not store.create("a", b"")


def test_what_is_not_there_is_not_copied(store: ObjectStore, cache: Path) -> None:
    with pytest.raises(InputError, check=says(got="fox.png: no such object or folder")):
        local_copy(f"{store.url}/fox.png")
    assert list(cache.iterdir()) == []


def test_parameters_with_addresses_get_the_paths_of_copies(cache: Path) -> None:
    for name in ("a.png", "b.safetensors"):
        ObjectStore("memory://given").write(name, b"")
    values = {
        "image": "memory://given/a.png",
        "base_model": "hub:owner/name",
        "caption": "memory://given/a.png",
        "training": {"start_from": "memory://given/b.safetensors", "num_steps": 2},
        "evaluation": {"views": ["memory://given/a.png", "b.png"]},
    }
    given = with_local_copies(values)
    a, b = (local_copy(f"memory://given/{name}") for name in ("a.png", "b.safetensors"))
    assert given == values | {
        "image": a,
        "training": {"start_from": b, "num_steps": 2},
        "evaluation": {"views": [a, "b.png"]},
    }
    assert with_paths_in(values, Path("/elsewhere"), None)["image"] == "memory://given/a.png"
