"""The values of all steps of a training, in as little memory as in a file."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, overload

import torch

HistoryRow = dict[str, float]


class History(Sequence[HistoryRow]):
    """Rows with equal columns, one of which is `step`, an integer; the others are floats.

    A row takes 8 bytes a column, a fraction of what a dictionary takes.
    """

    def __init__(self) -> None:
        self._columns: tuple[str, ...] = ()
        self._values = array("d")  # row by row

    def append(self, row: HistoryRow) -> None:
        """Add a row after the others.

        Raises:
            KeyError: a column of the first row is missing.
        """
        if not self._columns:
            self._columns = tuple(row)
        self._values.extend([row[column] for column in self._columns])

    def cut(self, step: int) -> None:
        """Remove the rows after a step."""
        kept = sum(row["step"] <= step for row in self)
        del self._values[kept * len(self._columns) :]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._values) // len(self._columns) if self._columns else 0

    @overload
    def __getitem__(self, index: int) -> HistoryRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[HistoryRow]: ...

    def __getitem__(self, index: int | slice) -> HistoryRow | list[HistoryRow]:
        """Return a row, or several."""
        rows = range(len(self))[index]
        return self._row(rows) if isinstance(rows, int) else [self._row(row) for row in rows]

    def _row(self, index: int) -> HistoryRow:
        width = len(self._columns)
        row = dict(zip(self._columns, self._values[index * width : (index + 1) * width], strict=True))
        return row | {"step": int(row["step"])}

    def to_save(self) -> dict[str, Any]:
        """Return the columns, and the values as a float64 tensor `[rows, columns]`."""
        values = torch.tensor(self._values, dtype=torch.float64).reshape(len(self), len(self._columns))
        return {"columns": list(self._columns), "values": values}

    @classmethod
    def of_saved(cls, saved: dict[str, Any]) -> History:
        """Return the history of which `to_save` has made this."""
        history = cls()
        history._columns = tuple(saved["columns"])
        history._values.extend(saved["values"].flatten().tolist())
        return history
