"""The prompt database.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro_datasets._typing import TablePreview

from dreamartist_pipeline.datasets.inputs import FileError, ReadOnlyDataset

if TYPE_CHECKING:
    import pandas as pd


class PromptDatabaseDataset(ReadOnlyDataset["pd.DataFrame"]):
    """A table of prompts in a parquet file; the parameter `prompts.column` names the column that holds them.

    Args:
        filepath: a parquet file.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> "pd.DataFrame":
        """Return the whole table.

        Raises:
            FileError: no file, or not a parquet file.
        """
        import pandas as pd
        import pyarrow as pa

        self._check_file()
        try:
            return pd.read_parquet(self._filepath)
        except (pa.ArrowException, OSError) as error:
            raise FileError(
                expected=f"a prompt database (parquet) at {self._filepath}",
                got=f"another file format ({error})",
                remedy="convert it, for example with pandas: pd.read_csv(FILE).to_parquet(...)",
            ) from error

    def preview(self, nrows: int = 8) -> TablePreview:
        """Show the first rows, without reading the others."""
        import pyarrow.parquet as pq

        self._check_file()
        file = pq.ParquetFile(self._filepath)
        first = next(file.iter_batches(batch_size=nrows), None)
        rows = [] if first is None else [list(row.values()) for row in first.to_pylist()]
        return TablePreview({"index": list(range(len(rows))), "columns": file.schema_arrow.names, "data": rows})

    def _check_file(self) -> None:
        if not self._filepath.is_file():
            raise FileError(
                expected=f"a prompt database (parquet) at {self._filepath}",
                got="no such file",
                remedy="correct prompt_database in the catalog",
            )

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
