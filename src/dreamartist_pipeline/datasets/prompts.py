"""The prompt database.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro_datasets._typing import TablePreview

from dreamartist_pipeline.core.first_bytes import kind_of
from dreamartist_pipeline.datasets.inputs import FileError, ReadOnlyDataset, place_of

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


_MAX_SHOWN = 500  # characters of a text in the preview


class PromptDatabaseDataset(ReadOnlyDataset["ParquetFile"]):
    """A table of prompts in a parquet file, of which only the column with the prompts is ever read.

    Args:
        filepath: a parquet file.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> "ParquetFile":
        """Open the file; rows are read on request, a repeated text only once per batch.

        Raises:
            FileError: no file, or not a parquet file.
        """
        return self._open()

    def preview(self, nrows: int = 8) -> TablePreview:
        """Show the first rows without reading the others; nested and binary values, such as images, by their type.

        Raises:
            FileError: no file, not a parquet file, or a damaged one.
        """
        import pyarrow as pa

        file = self._open()
        schema = file.schema_arrow
        shown = [field.name for field in schema if not (pa.types.is_nested(field.type) or "binary" in str(field.type))]
        try:
            first = next(file.iter_batches(batch_size=nrows, columns=shown), None)
            rows = [] if first is None else first.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise FileError(
                expected=f"a readable prompt database at {self._filepath}",
                got=f"a damaged one ({error})",
                remedy="write the file again",
            ) from error
        data = [[_short(row.get(field.name, f"({field.type})")) for field in schema] for row in rows]
        return TablePreview({"index": list(range(len(data))), "columns": schema.names, "data": data})

    def _open(self) -> "ParquetFile":
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._filepath.is_file():
            raise FileError(
                expected=f"a prompt database (parquet) at {self._filepath}",
                got="no such file",
                remedy="give one as --params prompt_database=FILE, a table with a column of prompts (docs/running.md)"
                f"{place_of(self._filepath)}",
            )
        try:
            schema = pq.read_schema(self._filepath)
            texts = [field.name for field in schema if field.type in (pa.string(), pa.large_string())]
            return pq.ParquetFile(self._filepath, read_dictionary=texts)
        except (pa.ArrowException, OSError, UnicodeDecodeError, RecursionError) as error:
            with self._filepath.open("rb") as file:
                kind = kind_of(file.read(1000))
            raise FileError(
                expected=f"a prompt database (parquet) at {self._filepath}",
                got=f"a damaged parquet table ({' '.join(str(error).split())})" if kind == "a parquet table" else kind,
                remedy="download it again, or convert it, such as by pd.read_csv(FILE).to_parquet(FILE) of pandas",
            ) from error

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}


def _short(value: Any) -> Any:
    """Return a value for the preview: of a long text the beginning."""
    return f"{value[:_MAX_SHOWN]}…" if isinstance(value, str) and len(value) > _MAX_SHOWN else value
