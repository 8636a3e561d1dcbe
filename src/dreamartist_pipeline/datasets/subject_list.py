"""Subjects of a run that starts one run for each: a table, or a folder of pictures."""

from __future__ import annotations

import csv
import io
import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamartist_pipeline.datasets.inputs import PICTURE_SUFFIXES, FileError, ReadOnlyDataset, place_of
from dreamartist_pipeline.datasets.user_files import resolved
from dreamartist_pipeline.object_stores import is_remote, local_copy

SUBJECT, IMAGE = "subject", "image"
"""Columns that every table has."""
_FILES = (IMAGE, "mask")  # columns with paths
_TABLES = (".csv", ".parquet")
_MAX_BYTES = 100_000_000
_BATCH_ROWS = 16
_COLUMNS = "the columns subject and image, and any run settings (class_word, caption) and parameters (training.seed)"

_CELLS = (str, bool, int, float, list, dict, type(None))
SubjectRow = dict[str, Any]
"""Run setting, or dotted parameter -> value; of a CSV file all are texts. Empty cells are left out."""


class SubjectListDataset(ReadOnlyDataset[Sequence[SubjectRow]]):
    """Subjects in a table (CSV or Parquet), or one for each picture in a folder, named by its file.

    Relative paths of pictures and masks in a table begin in the table's folder, also of one in a store.

    Args:
        path: base folder of a relative path.
        source: path of the table or folder, or its address in a store; None for no subjects.
    """

    def __init__(self, *, path: str, source: str | None, metadata: dict[str, Any] | None = None) -> None:
        self._root = Path(path).absolute()
        self._address = source.rstrip("/") if source is not None and is_remote(source) else None
        self._source = None if source is None or self._address else resolved(source, Path(path))
        self.metadata = metadata

    def load(self) -> Sequence[SubjectRow]:
        """Return the subjects in their order.

        Raises:
            FileError: no such table or folder, none that can be read, missing columns or cells, no subject, or one
                twice.
        """
        source = Path(local_copy(self._address)) if self._address else self._source
        if source is None:
            raise FileError(
                expected=f"a table of subjects ({', '.join(_TABLES)}) or a folder of pictures",
                got="none",
                remedy="name it: kedro personalize SUBJECTS",
            )
        rows = self._of_pictures(source) if source.is_dir() else _of_table(source)
        _check_names(rows, source)
        for row in rows:
            files = {name: str(row[name]) for name in _FILES if name in row}
            row |= {name: self._found(file, source) for name, file in files.items()}
        return rows

    def _found(self, file: str, source: Path) -> str:
        """Return a path in the source as the runs find it, which may be executed by other machines."""
        if is_remote(file):
            return file
        if self._address is None or Path(file).expanduser().is_absolute():
            return self._shown(resolved(file, source if source.is_dir() else source.parent))
        scheme, _, place = (self._address if source.is_dir() else self._address.rpartition("/")[0]).partition("://")
        return f"{scheme}://{posixpath.normpath(f'{place}/{file}')}"

    @staticmethod
    def _of_pictures(folder: Path) -> list[SubjectRow]:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file())
        return [{SUBJECT: file.stem, IMAGE: file.name} for file in files]

    def _shown(self, file: Path) -> str:
        """Return a path from the base folder, where the runs find it, if it is inside; else an absolute one."""
        absolute = file.absolute()
        return (absolute.relative_to(self._root) if absolute.is_relative_to(self._root) else absolute).as_posix()

    def _exists(self) -> bool:
        return self._address is not None or (self._source is not None and self._source.exists())

    def _describe(self) -> dict[str, Any]:
        return {"source": self._address or (self._source and self._source.as_posix())}


def _of_table(file: Path) -> list[SubjectRow]:
    names, cells = _read(file)
    if missing := [name for name in (SUBJECT, IMAGE) if name not in names]:
        raise FileError(
            expected=f"{file} with {_COLUMNS}",
            got=f"no column {' and no column '.join(missing)} among {', '.join(names)}",
            remedy="add it; the first line of a CSV file has the names, separated by commas",
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise FileError(expected=f"{file} with every column once", got=", ".join(twice), remedy="leave out the others")
    rows = [dict(zip(names, values, strict=False)) for values in cells]
    for number, row in enumerate(rows, start=1):
        for name in [name for name, value in row.items() if value is None]:
            del row[name]
        if wrong := [name for name in (SUBJECT, IMAGE) if not isinstance(row.get(name), str)]:
            raise FileError(
                expected=f"texts as {' and '.join((SUBJECT, IMAGE))} in every row of {file}",
                got=f"{wrong[0]} {row.get(wrong[0], 'without a value')} in row {number}",
                remedy="correct it, or delete the row",
            )
    return rows


def _read(file: Path) -> tuple[list[str], list[list[Any]]]:
    """Return the names of the columns, and the rows; None for an empty cell."""
    if file.suffix.lower() not in _TABLES or not file.is_file():
        raise FileError(
            expected=f"a table of subjects ({', '.join(_TABLES)}) or a folder of pictures at {file}",
            got="another kind of file" if file.is_file() else "no such file or folder",
            remedy=f"correct the path{place_of(file)}",
        )
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise FileError(
            expected=f"a table of at most {_MAX_BYTES:,} bytes", got=f"{size:,} in {file}", remedy="give it in parts"
        )
    try:
        return _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_csv(file)
    except (OSError, ValueError, csv.Error) as error:
        raise FileError(
            expected=f"{file} as a table, in UTF-8, with {_COLUMNS}",
            got=str(error).splitlines()[0],
            remedy="correct it",
        ) from error


def _read_csv(file: Path) -> tuple[list[str], list[list[Any]]]:
    lines = csv.reader(io.StringIO(file.read_text(encoding="utf-8-sig")), skipinitialspace=True, strict=True)
    names, *rows = [[cell.strip() for cell in line] for line in lines if any(line)] or [[]]
    for number, row in enumerate(rows, start=1):
        if len(row) > len(names):
            raise ValueError(
                f"{len(row)} cells in row {number} under {len(names)} names; write texts with commas in double quotes"
            )
    return names, [[cell or None for cell in row] for row in rows]


def _read_parquet(file: Path) -> tuple[list[str], list[list[Any]]]:
    import pyarrow as pa
    from pyarrow import parquet

    rows: list[list[Any]] = []
    num_bytes = 0
    try:
        table = parquet.ParquetFile(file)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):  # one stored value may be in all rows
            num_bytes += batch.nbytes
            if num_bytes > _MAX_BYTES:
                raise ValueError(f"a table of more than {_MAX_BYTES:,} bytes")
            rows += [list(row) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)]
        names = [name.strip() for name in table.schema_arrow.names]
    except (pa.ArrowException, RecursionError) as error:
        raise ValueError(f"a damaged Parquet file: {' '.join(str(error).split())}") from error
    for row in rows:
        for name, value in zip(names, row, strict=True):
            if not isinstance(value, _CELLS):
                raise ValueError(f"a {type(value).__name__} in the column {name}; write it as a text, or leave it out")
    return names, [[(cell.strip() or None) if isinstance(cell, str) else cell for cell in row] for row in rows]


def _check_names(rows: Sequence[SubjectRow], source: Path) -> None:
    if not rows:
        raise FileError(
            expected=f"subjects in {source}, a table or a folder of pictures ({', '.join(PICTURE_SUFFIXES)})",
            got="none",
            remedy="add some, or correct the path",
        )
    if twice := [name for name, count in Counter(row[SUBJECT] for row in rows).items() if count > 1]:
        raise FileError(
            expected=f"every subject in {source} once, because its name is that of its folders",
            got=", ".join(twice[:5]),
            remedy="give them different names",
        )
