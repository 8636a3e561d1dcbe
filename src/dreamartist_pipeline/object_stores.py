"""Folders in object stores, such as s3://BUCKET/FOLDER, and locks of what several machines do there.

fsspec reaches them (https://filesystem-spec.readthedocs.io); its packages for each kind of store, such as s3fs and
gcsfs, say how credentials are given.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.locks import Holder, LockHeldError
from dreamartist_pipeline.redaction import redact, without_credentials
from dreamartist_pipeline.whole_files import restored, written_whole, written_whole_folder

SILENT_S = 60.0
"""After how long a holder of a lock that does not write it again is taken for dead."""
_BEATS = 6  # in that time
_POLL_S = 0.5
_EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")  # of a conditional write
_MARKS = (
    "ETag",
    "etag",
    "content_md5",
    "md5Hash",
    "generation",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
    "size",
)

log = logging.getLogger(__name__)


def is_remote(location: str) -> bool:
    """Return whether a text is a URL, and neither a path nor an id of the Hugging Face hub."""
    return "://" in location


class ObjectStore:
    """A folder of which the objects appear whole or not at all.

    Args:
        url: of the folder; it need not exist.

    Raises:
        InputError: no kind of store that fsspec knows, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        with self._explained():
            if not is_remote(url) or url.startswith(("file:", "local:")):
                raise ValueError("no address of a store; folders of this machine are given as paths")
            self._files, self._root = fsspec.url_to_fs(self.url, use_listings_cache=False)

    def folder(self, *names: str) -> ObjectStore:
        """Return a folder in this one."""
        inner = object.__new__(ObjectStore)
        inner.url, inner._files = "/".join([self.url, *names]), self._files
        inner._root = "/".join([self._root, *names])
        return inner

    def names(self) -> set[str]:
        """Return the names of the objects in the folder, without those of folders in it; none if there is no folder."""
        with self._explained():
            try:
                entries = self._files.ls(self._root, detail=True, refresh=True)
            except FileNotFoundError:
                return set()
        return {entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"} - {""}

    def find(self, name: str) -> dict[str, str]:
        """Return the objects of that name, or in the folder of that name and below it; none if it is not there.

        Returns:
            Name in this folder -> a text that changes with the object.

        Raises:
            InputError: a name that would be a file elsewhere on a disk.
        """
        with self._explained():
            found = self._files.find(f"{self._root}/{name}", detail=True)
            objects = {path.removeprefix(f"{self._root}/"): _mark(entry) for path, entry in found.items()}
            for one in objects:
                if {"..", "."} & set(one.split("/")) or one.startswith("/") or "\\" in one:
                    raise ValueError(f"an object named {one!r}")
        return {one: mark for one, mark in objects.items() if not one.endswith("/")}  # of a folder made in a console

    def read(self, name: str) -> bytes | None:
        """Return an object, or None if there is none."""
        with self._explained():
            try:
                content: bytes = self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
        return content

    def copy_from(self, name: str, file: Path) -> None:
        """Copy an object to a file of this machine.

        Raises:
            InputError: there is none, or the store cannot be reached.
        """
        with written_whole(file) as temporary, self._explained():
            self._files.get_file(f"{self._root}/{name}", str(temporary))

    def copy_to(self, name: str, file: Path) -> None:
        """Copy a file of this machine to an object."""
        with self._explained():
            self._files.put_file(str(file), f"{self._root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write an object, in place of the one that may be there."""
        with self._explained():
            self._files.pipe_file(f"{self._root}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object if there is none, and return whether there was none: of several writers, one succeeds."""
        with self._explained():
            try:
                self._files.pipe_file(f"{self._root}/{name}", content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _code_of(error) in _EXISTS:
                    return False
                raise
        return True

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        with self._explained():
            try:
                self._files.rm_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return

    def local_copy(self, name: str) -> str:
        """Return the path of a copy of an object or a folder; see the function `local_copy`."""
        found = self.find(name)
        if not found:
            with self._explained():
                raise FileNotFoundError(f"{name}: no such object or folder")
        is_folder = name not in found
        if not is_folder:
            found |= self.find(f"{name.rpartition('.')[0]}.txt")  # the caption of a picture
        version, place = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (repr(found), self.url))
        folder = _cache() / f"{place}-{version}"
        if not restored(folder).exists():
            log.info("%s/%s is copied to %s.", without_credentials(self.url), name, folder)
            with written_whole_folder(folder) as new:
                for one in found:
                    self.copy_from(one, new / one)
        return str(folder / name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the store in every error; the packages for stores raise errors of their own."""
        try:
            yield
        except Exception as error:
            missing = isinstance(error, ImportError)
            raise InputError(
                expected=f"the store {without_credentials(self.url)}",
                got=redact(f"{type(error).__name__}: {error}".partition("\n")[0]),
                remedy="install its package, such as pip install 'dreamartist-pipeline[s3]' for s3://"
                if missing
                else "check address, credentials and network",
            ) from error


def _mark(entry: Mapping[str, Any]) -> str:
    """Return what changes with an object, as far as its store says so."""
    return " ".join(f"{name}={entry[name]}" for name in _MARKS if entry.get(name) is not None)


def _code_of(error: BaseException) -> str:
    """Return the code by which a store has answered, of S3-like ones."""
    answer = getattr(error.__cause__ or error, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def _cache() -> Path:
    return Path(os.environ.get("DREAMARTIST_CACHE") or "~/.cache/dreamartist_pipeline").expanduser()


class StoreLock:
    """A `locks.Lock` between machines: an object that its holder writes again every few seconds.

    A holder that is silent is taken for dead, and the next one takes the lock. Two may hold it for a moment then: what
    it protects may be done twice, but must come to the same.

    Args:
        store: the folder of the object.
        name: of the object.
        protects: what is locked, in messages.
        silent_s: see SILENT_S.
    """

    def __init__(self, store: ObjectStore, name: str, protects: str, silent_s: float = SILENT_S) -> None:
        self._store, self._name, self._protects, self._silent_s = store, name, protects, silent_s
        self._token = secrets.token_hex(8)
        self._seen: tuple[bytes | None, float] = None, 0.0  # what the last look found, and since when

    @contextmanager
    def hold(self, wait_s: float = 0) -> Iterator[None]:
        """See `locks.Lock.hold`.

        Raises:
            LockHeldError: another one holds it after `wait_s`.
            InputError: the store cannot be reached.
        """
        end_s = time.monotonic() + wait_s
        while not self._taken():
            if time.monotonic() >= end_s:
                raise LockHeldError(
                    expected=f"{self._protects}, unused by other machines",
                    got=f"in use by {self._holder()}",
                    remedy="wait until it has finished, or end it",
                )
            time.sleep(_POLL_S)
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=[ended], daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            if self._is_mine():
                self._store.remove(self._name)

    def _taken(self) -> bool:
        if self._store.create(self._name, self._text()):
            return True
        content, now_s = self._store.read(self._name), time.monotonic()
        if content is None or content != self._seen[0]:
            self._seen = content, now_s
            return False
        if now_s - self._seen[1] < self._silent_s:
            return False
        log.warning("%s: %s is silent, and its work is taken over.", self._protects, self._holder())
        self._store.remove(self._name)
        return self._store.create(self._name, self._text())

    def _beat(self, ended: threading.Event) -> None:
        """Write the object again and again, unless another one has taken it."""
        while not ended.wait(self._silent_s / _BEATS):
            try:
                if not self._is_mine():
                    return
                self._store.write(self._name, self._text())
            except InputError as error:
                log.warning("%s", error)

    def _is_mine(self) -> bool:
        return self._read().get("token") == self._token

    def _text(self) -> bytes:
        holder = asdict(Holder.this_process())
        return json.dumps(holder | {"token": self._token, "beat": secrets.token_hex(4)}).encode()

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self._store.read(self._name) or b"{}")
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    def _holder(self) -> str:
        values = self._read()
        return f"process {values.get('process', '?')} on {values.get('host', '?')} ({values.get('command', '?')})"


def local_copy(url: str) -> str:
    """Return the path of a copy of a remote file or folder, which is made once for each version of it.

    A text file beside a picture, its caption, is copied, too. Copies are in DREAMARTIST_CACHE, by default
    ~/.cache/dreamartist_pipeline. Nobody needs them after a run.

    Raises:
        InputError: nothing is there, or the store cannot be reached.
    """
    place, _, name = url.rstrip("/").rpartition("/")
    return ObjectStore(place).local_copy(name)
