"""A file or folder is replaced by a whole one, or stays as it was."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.whole_files import (
    STAGED,
    finish_publishing,
    publish,
    remove_leftovers,
    restored,
    written_whole,
    written_whole_folder,
)
from refusals import says
from small_disks import mount_read_only, mount_small

_WRITE_FOREVER = """
import itertools, sys
from pathlib import Path
from dreamartist_pipeline.whole_files import written_whole, written_whole_folder
target, kind = Path(sys.argv[1]), sys.argv[2]
for number in itertools.count():
    text = f"{number} " * 5000
    if kind == "file":
        with written_whole(target) as temporary:
            temporary.write_text(text)
    else:
        with written_whole_folder(target) as temporary:
            for name in "ab":
                (temporary / name).write_text(text)
    if number == 0:
        print("started", flush=True)
    if number == int(sys.argv[3]):
        break
"""


def start_writer(target: Path, kind: str, last: int = -1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITE_FOREVER, str(target), kind, str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def is_whole(text: str) -> bool:
    return text == text.split(" ", maxsplit=1)[0].join(["", " "]) * 5000


# ------------------------------------------------------------------------------------------------- files


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "a.txt"
    with written_whole(file) as temporary:
        temporary.write_text("old")
    with written_whole(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
        assert (temporary.parent, temporary.suffix) == (file.parent, file.suffix)
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(file) as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with written_whole(file) as first, written_whole(file) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert file.read_text() == "first"  # it was finished last
    assert list(tmp_path.iterdir()) == [file]


def test_it_is_readable_by_those_who_may_read_other_new_files(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a") as temporary:
        temporary.write_text("")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_hidden_file_of_a_user_is_left_alone(tmp_path: Path) -> None:
    for name in (".a.partial", ".a.0123456789ab.partial.x.y", "a.0123456789ab.partial.txt", ".a.txt"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_writers_leave_a_whole_target_and_the_next_one_removes_their_remains(tmp_path: Path, kind: str) -> None:
    chance, target = random.Random(0), tmp_path / "a.txt"
    for _ in range(15):
        with start_writer(target, kind) as process:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(chance.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        if kind == "file":
            assert is_whole(target.read_text())
        else:
            texts = {(restored(target) / name).read_text() for name in "ab"}
            assert len(texts) == 1 and is_whole(texts.pop())
    with start_writer(target, kind, last=0) as process:
        assert process.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_four_processes_save_at_once_fifty_times(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a.txt"
    processes = [start_writer(target, kind, last=50) for _ in range(4)]
    while any(process.poll() is None for process in processes):
        if kind == "file" and target.exists():
            assert is_whole(target.read_text())
    assert [process.wait() for process in processes] == [0] * 4
    for process in processes:
        process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    for file in [target] if kind == "file" else target.iterdir():
        assert is_whole(file.read_text())


def test_the_file_of_a_writer_that_only_waits_is_kept(tmp_path: Path) -> None:
    def is_kept(process: subprocess.Popen[str]) -> bool:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.005)
        partial = list(tmp_path.glob(".*.partial.txt"))
        remove_leftovers(tmp_path)
        kept = bool(partial) and list(tmp_path.glob(".*.partial.txt")) == partial
        process.send_signal(signal.SIGCONT)
        time.sleep(0.003)
        return kept

    with start_writer(tmp_path / "a.txt", "file") as process:
        assert process.stdout is not None and process.stdout.readline()
        try:  # until it is stopped within a write; a file that it has not locked yet is removed, and made again
            assert any(is_kept(process) for _ in range(200))
            assert process.poll() is None
        finally:
            process.kill()


# ------------------------------------------------------------------------------------------------- folders


def test_a_folder_put_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with written_whole_folder(folder) as temporary:
        (temporary / "old.txt").write_text("old")
    folder.rename(tmp_path / ".export.old")  # as after a kill between the two renames
    assert (restored(folder) / "old.txt").read_text() == "old"
    folder.rename(tmp_path / ".export.old")
    with pytest.raises(KeyboardInterrupt), written_whole_folder(folder):
        raise KeyboardInterrupt
    assert (restored(folder) / "old.txt").read_text() == "old"
    with written_whole_folder(folder) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["export", "export/new.txt"]


# ------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 256 KiB."""
    with mount_small(tmp_path / "small") as folder:
        yield folder


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that not even root can write to."""
    (tmp_path / "writable").mkdir()
    (tmp_path / "writable" / "a.txt").write_text("old")
    with mount_read_only(tmp_path / "read-only", tmp_path / "writable") as folder:
        yield folder


def test_a_full_disk_is_named_and_keeps_the_old_file(small_disk: Path) -> None:
    file = small_disk / "a.txt"
    with written_whole(file) as temporary:
        temporary.write_text("old")
    with pytest.raises(InputError, check=says(expected=str(file), got="full")), written_whole(file) as temporary:
        temporary.write_bytes(bytes(2**20))
    with (
        pytest.raises(InputError, check=says(expected=str(small_disk / "b"), got="full")),
        written_whole_folder(small_disk / "b") as temporary,
    ):
        (temporary / "c").write_bytes(bytes(2**20))
    assert file.read_text() == "old"
    assert list(small_disk.iterdir()) == [file]


def test_a_full_disk_is_recognised_though_the_library_hides_it(small_disk: Path) -> None:
    import torch

    file = small_disk / "a.pt"
    with pytest.raises(InputError, check=says(expected=str(file), got="full")), written_whole(file) as temporary:
        torch.save(torch.zeros(2**20), temporary)
    assert not list(small_disk.iterdir())


def test_a_read_only_folder_is_named(read_only_folder: Path) -> None:
    with (
        pytest.raises(InputError, check=says(expected="a.txt", remedy=str(read_only_folder))),
        written_whole(read_only_folder / "a.txt"),
    ):
        pass
    with (
        pytest.raises(InputError, check=says(remedy=str(read_only_folder))),
        written_whole_folder(read_only_folder / "b"),
    ):
        pass
    assert os.listdir(read_only_folder) == ["a.txt"]  # noqa: PTH208


@pytest.mark.parametrize("num_renamed", range(5))
def test_a_folder_is_published_with_its_set_also_after_a_kill_between_the_renames(
    tmp_path: Path, num_renamed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is renamed first, then the concept, the earlier folder aside, and the new one."""
    journal, concept, steps = tmp_path / "journal", tmp_path / "concept", tmp_path / "steps"
    for folder, text in ((tmp_path, "old"), (tmp_path / STAGED, "new")):
        (folder / "steps").mkdir(parents=True)
        (folder / "steps" / text).write_text(text)
        (folder / "concept").write_text(text)
    replace, counter = Path.replace, itertools.count()

    def killed(self: Path, target: Path) -> Path:
        if next(counter) == num_renamed:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with contextlib.suppress(KeyboardInterrupt):
            publish([concept, steps], journal)
    assert journal.exists() == (num_renamed in (1, 2, 3))
    finish_publishing(journal)
    expected = "old" if num_renamed == 0 else "new"
    assert concept.read_text() == expected
    assert [file.name for file in steps.iterdir()] == [expected]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != STAGED) == ["concept", "steps"]
    assert (tmp_path / STAGED).exists() == (num_renamed == 0)
