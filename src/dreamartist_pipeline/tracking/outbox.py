"""What a tracking store has not taken, in a folder per run: a line of JSON per record, and copies of files.

outbox/<run id>/run.json        the store, the run, and the lock of its process
outbox/<run id>/records.jsonl   one record per line, in their order
outbox/<run id>/files/          the files of the records
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreamartist_pipeline.whole_files import written_whole

MAX_BYTES = 2**30
"""The limit for all outboxes of a project together."""
_RUN, _RECORDS, _FILES = "run.json", "records.jsonl", "files"

Kind = Literal["batch", "tag", "status", "inputs", "experiment_tag", "file", "model"]
_COPIED = {"file": "file", "model": "folder"}  # kind -> the entry of its content that names what is copied


@dataclass(frozen=True)
class Record:
    """What MLflow is to store of a run.

    Attributes:
        kind: which call of the store delivers it.
        content: its arguments, as JSON types. Of a file: `file`, a local path, and `path`, its folder in the run. Of a
            model: see `models.model_record`.
    """

    kind: Kind
    content: Mapping[str, Any]

    def counted(self) -> Counter[str]:
        """Return how many metrics, parameters, tags, files and others it has."""
        if self.kind == "batch":
            return Counter({name: len(self.content[name]) for name in ("metrics", "parameters", "tags")})
        names = {"tag": "tags", "inputs": "inputs", "experiment_tag": "tags", "status": "status"}
        return Counter({names.get(self.kind, f"{self.kind}s"): 1})


def described(counts: Mapping[str, int]) -> str:
    """Return counts as text, such as `12 metrics, 1 file, the status`."""
    parts = [
        f"{count} {name if count > 1 else name[:-1]}" for name, count in counts.items() if count and name != "status"
    ]
    return ", ".join([*parts, *(["the status"] if counts.get("status") else [])]) or "nothing"


class Outbox:
    """The records of one run that are not delivered.

    Nothing is written before the first of them. Not for several threads at once: `Delivery` has the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._num_bytes: int | None = None

    @property
    def run_id(self) -> str:
        """The id of the run in its store."""
        return self.folder.name

    def about(self) -> dict[str, Any]:
        """Return what run.json says.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        about: dict[str, Any] = json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
        return about

    def append(self, record: Record, about: Mapping[str, Any]) -> None:
        """Keep a record, and a copy of its file or folder; a kill from then on does not lose it.

        Raises:
            OSError, InputError: it cannot be written, or all outboxes together would exceed MAX_BYTES.
        """
        if not (self.folder / _RUN).exists():
            with written_whole(self.folder / _RUN) as file:
                file.write_text(json.dumps(about, indent=1), encoding="utf-8")
        if (entry := _COPIED.get(record.kind)) is not None:
            copy = self._copied(Path(record.content[entry]))
            record = Record(record.kind, {**record.content, entry: copy})
        line = (json.dumps({"kind": record.kind, **record.content}) + "\n").encode()
        self._reserve(len(line))
        _append(self.folder / _RECORDS, line)

    def __iter__(self) -> Iterator[Record]:
        """Yield the records in their order, with the paths of their files; a line that a kill has cut is left out."""
        file = self.folder / _RECORDS
        if file.exists():
            with file.open("rb") as lines:
                yield from (self._read(line) for line in lines if line.endswith(b"\n"))

    def replace(self, records: Sequence[Record]) -> None:
        """Keep only these of the records; without any, the folder is removed."""
        self._num_bytes = None
        if not records:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        with written_whole(self.folder / _RECORDS) as file:
            file.write_bytes(b"".join(self._written(record) for record in records))
        kept = {Path(record.content[_COPIED[record.kind]]).parent.name for record in records if record.kind in _COPIED}
        for copy in (self.folder / _FILES).glob("*"):
            if copy.name not in kept:
                shutil.rmtree(copy, ignore_errors=True)

    def counts(self) -> Counter[str]:
        """Return how many metrics, files and so on it has."""
        return sum((record.counted() for record in self), Counter())

    def _read(self, line: bytes) -> Record:
        content = json.loads(line)
        kind = content.pop("kind")
        if (entry := _COPIED.get(kind)) is not None:
            content[entry] = str(self.folder / _FILES / content[entry])
        return Record(kind, content)

    def _written(self, record: Record) -> bytes:
        content = dict(record.content)
        if (entry := _COPIED.get(record.kind)) is not None:
            content[entry] = Path(content[entry]).relative_to(self.folder / _FILES).as_posix()
        return (json.dumps({"kind": record.kind, **content}) + "\n").encode()

    def _copied(self, path: Path) -> str:
        """Copy a file or folder into a sub-folder of its own, and return its path below `files`."""
        self._reserve(_num_bytes(path))
        number = 1 + max((int(folder.name) for folder in (self.folder / _FILES).glob("*")), default=0)
        copy = self.folder / _FILES / str(number) / path.name
        copy.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, copy, copy_function=_copy)
        else:
            _copy(path, copy)
        return f"{number}/{path.name}"

    def _reserve(self, num_bytes: int) -> None:
        """Count bytes that are to be written.

        Raises:
            OSError: there would be too many.
        """
        if self._num_bytes is None:
            self._num_bytes = _num_bytes(self.folder.parent)
        if self._num_bytes + num_bytes > MAX_BYTES:
            raise OSError(f"more than {MAX_BYTES / 2**30:.0f} GiB in {self.folder.parent}")
        self._num_bytes += num_bytes


def _num_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _copy(file: str | Path, copy: str | Path) -> None:
    """Copy a file, or link it where the disk is full: that takes no space."""
    try:
        shutil.copyfile(file, copy)
    except OSError:
        Path(copy).unlink(missing_ok=True)
        os.link(file, copy)


def _append(file: Path, line: bytes) -> None:
    """Append a line, or nothing.

    Raises:
        OSError: the disk is full, or the folder is read-only.
    """
    with file.open("ab", buffering=0) as opened:
        end = opened.tell()
        try:
            if opened.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        except OSError:
            opened.truncate(end)
            raise
