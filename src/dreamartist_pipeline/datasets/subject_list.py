"""Subjects of a run that starts one run for each: a table, or a folder of pictures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamartist_pipeline.datasets.inputs import PICTURE_SUFFIXES, FileError, ReadOnlyDataset, place_of
from dreamartist_pipeline.datasets.user_files import resolved

SUBJECT, IMAGE = "subject", "image"
"""Columns that every table has."""
_FILES = (IMAGE, "mask")  # columns with paths
_TABLES = (".csv", ".parquet")
_MAX_BYTES = 100_000_000
_COLUMNS = "the columns subject and image, and any run settings (class_word, caption) and parameters (training.seed)"

SubjectRow = dict[str, Any]
"""Run setting, or dotted parameter -> value; of a CSV file all are texts. Empty cells are left out."""


class SubjectListDataset(ReadOnlyDataset[Sequence[SubjectRow]]):
    """Subjects in a table (CSV or Parquet), or one for each picture in a folder, named by its file.

    Relative paths in a table begin in the table's folder.

    Args:
        path: base folder of a relative path.
        source: path of the table or folder; None for no subjects.
    """

    def __init__(self, *, path: str, source: str | None, metadata: dict[str, Any] | None = None) -> None:
        self._source = None if source is None else resolved(source, Path(path))
        self.metadata = metadata

    def load(self) -> Sequence[SubjectRow]:
        """Return the subjects in their order.

        Raises:
            FileError: no such table or folder, none that can be read, missing columns or cells, no subject, or one
                twice.
        """
        if self._source is None:
            raise FileError(
                expected=f"a table of subjects ({', '.join(_TABLES)}) or a folder of pictures",
                got="none",
                remedy="name it: kedro personalize SUBJECTS",
            )
        rows = _of_pictures(self._source) if self._source.is_dir() else _of_table(self._source)
        _check_names(rows, self._source)
        return rows

    def _exists(self) -> bool:
        return self._source is not None and self._source.exists()

    def _describe(self) -> dict[str, Any]:
        return {"source": self._source and self._source.as_posix()}


def _of_pictures(folder: Path) -> list[SubjectRow]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file())
    return [{SUBJECT: file.stem, IMAGE: _shown(file)} for file in files]


def _of_table(file: Path) -> list[SubjectRow]:
    table = _read(file)
    names = [str(name).strip() for name in table.columns]
    if missing := [name for name in (SUBJECT, IMAGE) if name not in names]:
        raise FileError(
            expected=f"{file} with {_COLUMNS}",
            got=f"no column {' and no column '.join(missing)} among {', '.join(names)}",
            remedy="add it; the first line of a CSV file has the names, separated by commas",
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise FileError(expected=f"{file} with every column once", got=", ".join(twice), remedy="leave out the others")
    rows = []
    for number, values in enumerate(table.itertuples(index=False, name=None), start=1):
        row = {name: value for name, value in zip(names, map(_plain, values), strict=True) if value is not None}
        if empty := [name for name in (SUBJECT, IMAGE) if name not in row]:
            raise FileError(
                expected=f"a subject and an image in every row of {file}",
                got=f"no {' and no '.join(empty)} in row {number}",
                remedy="fill them in, or delete the row",
            )
        row[SUBJECT] = str(row[SUBJECT])
        rows.append(row | {name: _shown(file.parent / str(row[name])) for name in _FILES if name in row})
    return rows


def _read(file: Path) -> Any:
    """Return a table as a DataFrame; of a CSV file, all cells are texts."""
    import pandas as pd

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
        if file.suffix.lower() == ".parquet":
            return pd.read_parquet(file)
        text = io.StringIO(file.read_text(encoding="utf-8-sig"))
        return pd.read_csv(text, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (OSError, ValueError) as error:  # of pyarrow and pandas, among them damaged files and other encodings
        raise FileError(
            expected=f"{file} as a table in UTF-8 with {_COLUMNS}", got=str(error).splitlines()[0], remedy="correct it"
        ) from error


def _plain(value: Any) -> Any:
    """Return a cell as a type of Python; None for an empty one."""
    import pandas as pd

    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy, single values too
    if isinstance(value, str):
        return value.strip() or None
    return None if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)) else value


def _shown(file: Path) -> str:
    """Return a path relative to the working directory if it is inside, else absolute."""
    absolute = file.expanduser().absolute()
    return absolute.relative_to(Path.cwd()).as_posix() if absolute.is_relative_to(Path.cwd()) else absolute.as_posix()


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
