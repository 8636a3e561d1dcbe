"""The prompt database.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset, DatasetError
from kedro_datasets._typing import TablePreview

if TYPE_CHECKING:
    import pandas as pd


class PromptDatabaseDataset(AbstractDataset[None, "pd.DataFrame"]):
    """A table of prompts in a parquet file; which column holds them is a parameter of the draw.

    Args:
        filepath: a parquet file.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> "pd.DataFrame":
        """Read the whole table."""
        import pandas as pd
        import pyarrow as pa

        self._check_file()
        try:
            return pd.read_parquet(self._filepath)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(self._not_parquet(error)) from error

    def save(self, data: None) -> None:
        """Refuse: it is input."""
        raise DatasetError(f"{self._filepath} is a published prompt database; it is only read")

    def preview(self, nrows: int = 8) -> TablePreview:
        """Show the first rows, without reading the others."""
        import pyarrow.parquet as pq

        self._check_file()
        batches = pq.ParquetFile(self._filepath).iter_batches(batch_size=nrows)
        first = next(batches, None)
        rows = [] if first is None else [list(row.values()) for row in first.to_pylist()]
        columns = pq.ParquetFile(self._filepath).schema_arrow.names
        return TablePreview({"index": list(range(len(rows))), "columns": columns, "data": rows})

    def _check_file(self) -> None:
        if not self._filepath.is_file():
            raise DatasetError(
                f"expected a prompt database (parquet) at {self._filepath}; got no such file; "
                "correct prompt_database in the catalog"
            )

    def _not_parquet(self, error: Exception) -> str:
        return (
            f"expected a parquet file as prompt database at {self._filepath}; got something else ({error}); "
            "convert it, for example with pandas: pd.read_csv(FILE).to_parquet(...)"
        )

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
