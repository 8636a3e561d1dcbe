"""Texts of one column of a prompt database, which is never read as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetFile

from dreamartist_pipeline.errors import InputError

USUAL_NAMES = ("prompt", "text", "caption")
"""Names of the column with the prompts where none is given, the first first."""

MAX_CHARACTERS = 10_000
"""Length of a prompt; longer texts are no prompts and are skipped (a text encoder reads a few hundred characters)."""

_BATCH_ROWS = 65_536
_BATCH_BYTES = 64 * 1024**2  # of the column's values in one batch, as far as the file states their size
_NUM_CHECKED = 1_000
_MAX_LISTED = 20
_NO_PROMPTS = {  # kind of values -> what such a value looks like
    "bytes": re.compile(r"(?s)(?:.*[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]|b['\"].*\\x[0-9a-f]{2}|data:\w+/).*"),
    "file names": re.compile(
        r"(?i)[^\n]+\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif|hei[cf]|jxl|svg|psd|raw|npy|npz|pt|safetensors|txt|json|csv|"
        r"mp4|webm|tar|zip|parquet)|(?:[a-z]:)?[\w.-]*(?:[/\\][\w.-]+)+\.\w+"
    ),
    "addresses": re.compile(r"(?i)(?:[a-z][a-z0-9+.-]*://|www\.)\S+"),
    "numbers": re.compile(r"[\d\s.,:;/+-]+(?:[eE][+-]?\d+)?"),
    "hashes": re.compile(r"(?=\D*\d)(?:(?:0x)?[0-9a-fA-F]{8,}|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4,12}){4}|[\w+/=:-]{16,})"),
}


def select_column(schema: pa.Schema, column: str | int | None) -> int:
    """Return the position of the column with the prompts.

    Args:
        schema: of the prompt database.
        column: its name or position; None for the first text column of USUAL_NAMES, ignoring case, or else position 0.

    Raises:
        InputError: no such column, or one without text.
    """
    names = schema.names
    if column is None:
        position = _usual_column(schema)
    elif isinstance(column, str):
        position = names.index(column) if column in names else -1
    else:
        position = column
    if not 0 <= position < len(names):
        raise InputError(
            expected=f"prompts.column as the name or position of a column of the prompt database: {_listed(schema)}",
            got=f"{column!r}",
            remedy="name a column of the prompt database",
        )
    if not is_text(schema.field(position).type):
        raise _not_prompts(schema, position, f"values of type {_kind(schema.field(position).type)}")
    return position


def read_texts(database: ParquetFile, position: int) -> Iterator[str]:
    """Yield the texts of a column in the order of the rows, without missing and long ones and repetitions nearby.

    Raises:
        InputError: a part that cannot be read, or text that is not UTF-8.
    """
    name = database.schema_arrow.names[position]
    same_name = database.schema_arrow.get_all_field_indices(name).index(position)
    num_rows = 0
    try:
        for batch in database.iter_batches(_batch_rows(database, position), columns=[name]):
            column = batch.column(batch.schema.get_all_field_indices(name)[same_name]).unique()
            texts = column.dictionary if isinstance(column, pa.DictionaryArray) else column
            yield from texts.filter(pc.less_equal(pc.binary_length(texts), MAX_CHARACTERS)).to_pylist()
            num_rows += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        damage = "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else f"a damaged part ({error})"
        raise InputError(
            expected=f"UTF-8 text in column {name!r} of the prompt database",
            got=f"{damage} after row {num_rows:,}",
            remedy="write the file again, or use another prompt database",
        ) from error


def _batch_rows(database: ParquetFile, position: int) -> int:
    """Return how many rows are read at once: fewer if the file states that their values are long."""
    metadata, name = database.metadata, database.schema_arrow.names[position]
    leaves = [index for index in range(metadata.num_columns) if database.schema.column(index).path == name]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    sizes = [(group.column(leaf).total_uncompressed_size, group.num_rows) for group in groups for leaf in leaves]
    longest = max((size / max(1, num_rows) for size, num_rows in sizes), default=1)
    return int(min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, longest))))


def check_are_prompts(texts: Iterable[str], schema: pa.Schema, position: int) -> None:
    """Refuse a column of file names, hashes, addresses, numbers or bytes, judged by its first 1,000 texts.

    Raises:
        InputError: more than half of them are such values.
    """
    checked = list(islice(texts, _NUM_CHECKED))
    kinds = [kind for text in checked if (kind := _value_kind(text.strip()))]
    if len(kinds) > len(checked) / 2:
        raise _not_prompts(schema, position, max(kinds, key=kinds.count))


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds texts, or nothing at all."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _usual_column(schema: pa.Schema) -> int:
    for usual in USUAL_NAMES:
        for position, field in enumerate(schema):
            if field.name.lower() == usual and is_text(field.type):
                return position
    return 0


def _value_kind(text: str) -> str | None:
    return next((kind for kind, pattern in _NO_PROMPTS.items() if pattern.fullmatch(text)), None)


def _not_prompts(schema: pa.Schema, position: int, found: str) -> InputError:
    """Return an error without any value of the column, which may be a whole picture."""
    others = [field.name for index, field in enumerate(schema) if index != position and is_text(field.type)]
    choice = (
        f"set prompts.column to the one with the prompts ({', '.join(others[:_MAX_LISTED])}), or " if others else ""
    )
    return InputError(
        expected=f"a column of prompts in the prompt database, which has the columns {_listed(schema)}",
        got=f"{found} in column {schema.names[position]!r}",
        remedy=f"{choice}give another prompt database as --params prompt_database=FILE",
    )


def _listed(schema: pa.Schema) -> str:
    listed: Sequence[str] = [f"{field.name!r} ({_kind(field.type)})" for field in islice(schema, _MAX_LISTED)]
    more = [f"{len(schema) - _MAX_LISTED} more"] if len(schema) > _MAX_LISTED else []
    return ", ".join([*listed, *more]) or "none"


def _kind(kind: pa.DataType) -> str:
    """Return the name of a column's type; of nested ones only the outer type."""
    return "text" if is_text(kind) else re.sub(r"<.*", "", str(kind), flags=re.DOTALL)
