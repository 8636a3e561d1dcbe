"""Files and folders that are written completely or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamartist_pipeline.errors import InputError

_HAS_LOCKS = os.name != "nt"
if _HAS_LOCKS:
    import fcntl

STAGED = ".staged"
"""Name of the folders with files that are to be published together."""

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{12}\.partial(\.[^.]+)?")
_OLD = ".{name}.old"
_UNOWNED_AFTER_S = 24 * 60 * 60  # where files cannot be locked, nothing tells whether their writer lives
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TRIES = 5
_FULL_BELOW_BYTES = 2**16  # libraries that hide the error of the system leave less


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yield a new empty file beside `file`, with the same suffix, that becomes `file` on success.

    Readers see the old file or the complete new one, also after a power cut. Several processes may write one file: the
    last one wins. Folders are created; after an error nothing is left behind, and what a killed process has left in the
    folder is removed by the next writer.

    Raises:
        InputError: the disk is full, or the folder is not writable.
    """
    with _explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(file.parent)
        with _owned(file, is_folder=False) as temporary, _explained(file):  # before it is removed
            yield temporary
            flushed(temporary)
            temporary.replace(file)
            flushed(file.parent)


@contextmanager
def _folder_beside(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder of this process beside another one."""
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        with _owned(folder, is_folder=True) as temporary, _explained(folder):
            yield temporary


@contextmanager
def written_whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `folder` that takes its place on success.

    What was in the folder before is removed. Readers call `restored` first: between two renames there is no folder.

    Raises:
        InputError: the disk is full, or the folder beside it is not writable.
    """
    with _folder_beside(folder) as temporary:
        yield temporary
        _flush_all(temporary)
        _take_place(temporary, folder)


def _take_place(new: Path, folder: Path) -> None:
    """Rename a folder to another one, which is removed."""
    old = _old(folder)
    with _alone_in(folder.parent):
        _restore(folder)
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    flushed(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_new_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder that did not exist, and return its path: `folder`, or with -2, -3, … added where that exists.

    Args:
        folder: its path if it does not exist.
        write: fills an empty folder.

    Raises:
        InputError: the disk is full, or the folder beside it is not writable.
    """
    with _folder_beside(folder) as temporary:
        write(temporary)
        _flush_all(temporary)
        with _alone_in(folder.parent):
            numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
            target = next(path for path in itertools.chain([folder], numbered) if not path.exists())
            temporary.replace(target)
        flushed(folder.parent)
    return target


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flushed(path)


def restored(folder: Path) -> Path:
    """Return a folder of `written_whole_folder`, after bringing back an earlier one that a killed process put aside."""
    if not folder.exists() and _old(folder).exists():
        with _alone_in(folder.parent):
            _restore(folder)
    return folder


def final_place(file: Path) -> Path:
    """Return where a file is to be that may be in a folder STAGED until its set is published."""
    return file.parent.parent / file.name if file.parent.name == STAGED else file


def publish(files: Iterable[Path], journal: Path) -> None:
    """Put files and folders of one set, which are in the folders STAGED beside their places, in their places.

    After a kill in between, `finish_publishing` puts the rest there.

    Args:
        files: their places, also of folders.
        journal: a file that says so meanwhile.
    """
    names = [Path(os.path.relpath(file, journal.parent)).as_posix() for file in files]
    if names:
        with written_whole(journal) as temporary:
            temporary.write_text(json.dumps(names), encoding="utf-8")
        finish_publishing(journal)


def finish_publishing(journal: Path) -> None:
    """Complete what `publish` has begun; without a journal, that is nothing.

    Raises:
        InputError: a damaged journal.
    """
    try:
        files = [journal.parent / name for name in json.loads(journal.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return
    except (ValueError, TypeError) as error:
        raise InputError(
            expected=f"a list of files in {journal}",
            got=f"{error}",
            remedy=f"delete it, and run again what wrote the files in {journal.parent}",
        ) from error
    for file in files:
        staged = file.parent / STAGED / file.name
        if staged.is_dir():
            _take_place(staged, file)
        elif staged.exists():  # otherwise it is in its place already
            staged.replace(file)
    for folder in {file.parent for file in files if file.parent.is_dir()}:  # someone may have removed one since
        flushed(folder)
        with contextlib.suppress(OSError):  # not empty, or gone
            (folder / STAGED).rmdir()
    journal.unlink()
    flushed(journal.parent)  # after a power cut it would publish what a later run has staged


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in a folder whose writers were killed."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        partial = [Path(entry.path) for entry in entries if _PARTIAL.fullmatch(entry.name)]
    for path in partial:
        _remove_if_abandoned(path)


def flushed(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; Windows cannot open folders, and waits for none."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it for folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _owned(target: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield a new temporary file or folder beside `target`, and remove it at the end unless it was renamed.

    It is locked meanwhile, which tells other processes that its owner lives.
    """
    temporary, descriptor = _created(target, is_folder)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _close(descriptor)


def _created(target: Path, is_folder: bool) -> tuple[Path, int | None]:
    """Return a new temporary file or folder, and the descriptor that locks it; None where locks are missing."""
    suffix = "" if is_folder else target.suffix
    for _ in range(_TRIES):
        temporary = target.with_name(f".{target.name.removesuffix(suffix)}.{secrets.token_hex(6)}.partial{suffix}")
        if is_folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        if (descriptor := _locked(temporary)) is not None:
            return temporary, descriptor
        if not _has_locks(temporary.parent):
            break
        _remove(temporary)  # another process has taken it for abandoned before it was locked
    return temporary, None


def _locked(path: Path) -> int | None:
    """Lock a file or folder and return its descriptor; None if that is not possible, or it is gone.

    The lock ends with the process. It hinders nobody from reading or writing.
    """
    if not _HAS_LOCKS:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except OSError:
        pass
    _close(descriptor)
    return None


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _remove_if_abandoned(path: Path) -> None:
    """Remove a temporary file or folder if the process that was writing it has ended."""
    if not _has_locks(path.parent):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _UNOWNED_AFTER_S:
                _remove(path)
    elif (descriptor := _locked(path)) is not None:
        _remove(path)
        os.close(descriptor)


def _has_locks(folder: Path) -> bool:
    """Return whether the file system of a folder knows locks."""
    if not _HAS_LOCKS:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # another process renames in it
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time rename folders in a folder."""
    if not _has_locks(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _old(folder: Path) -> Path:
    return folder.with_name(_OLD.format(name=folder.name))


def _restore(folder: Path) -> None:
    """Bring back the folder that a killed process put aside; remove it if its successor is there."""
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.replace(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Raise an InputError for a full disk and for a folder that is not writable.

    Raises:
        InputError: one of these.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _NOT_WRITABLE:
            raise InputError(
                expected=f"to write {target}",
                got=f"{os.strerror(number)}",
                remedy=f"make {target.parent} writable",
            ) from error
        if number in _FULL or (not isinstance(error, InputError) and _is_full(target.parent)):
            raise InputError(
                expected=f"space on the disk to write {target}",
                got="a full disk",
                remedy="free some, and run the same command again",
            ) from error
        raise


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free < _FULL_BELOW_BYTES
