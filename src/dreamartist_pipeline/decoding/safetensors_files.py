"""Safetensors files: the header with all its bounds, then tensors one at a time.

The format is the length of the header (8 bytes, little-endian), the header (JSON) and the tensors without gaps. The
header is read apart from the tensors, so that a file is refused for its names or shapes before its contents are read.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from dreamartist_pipeline.decoding.json_text import parse_json, reasons
from dreamartist_pipeline.decoding.unread_files import name_unread
from dreamartist_pipeline.errors import InputError

if TYPE_CHECKING:
    import torch

_HEAD_BYTES = 512
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 16 * 2**20  # the library reads up to 100 MB; published files have less than 10 MB
_MAX_DIMENSIONS, _MAX_ELEMENTS = 16, 2**48
_DTYPES = {  # name in safetensors -> name in torch, bytes; the library's `safetensors.torch._TYPES`
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**48)]


class TensorEntry(BaseModel):
    """A tensor in a header.

    Attributes:
        dtype: its name in safetensors, one that torch has.
        shape: of it.
        data_offsets: of its first byte and of the byte after it, from the end of the header.
    """

    dtype: Annotated[str, Field(strict=True)]
    shape: Annotated[tuple[_Count, ...], Field(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[_Count, _Count]

    @property
    def num_bytes(self) -> int:
        """The number of bytes between the offsets."""
        return self.data_offsets[1] - self.data_offsets[0]


_ENTRIES, _TEXTS = TypeAdapter(dict[str, TensorEntry]), TypeAdapter(dict[str, Annotated[str, Field(strict=True)]])


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a complete safetensors file.

    Attributes:
        tensors: name -> where it is.
        metadata: key -> text.
        start: where the tensors begin in the file.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    start: int

    def read(self, stream: BinaryIO, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own: a mapped file would keep its pages, and must not change."""
        import torch

        entry = self.tensors[name]
        dtype = getattr(torch, _DTYPES[entry.dtype][0])
        if not entry.num_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        content = bytearray(entry.num_bytes)
        stream.seek(self.start + entry.data_offsets[0])
        stream.readinto(content)  # type: ignore[attr-defined]
        return torch.frombuffer(content, dtype=dtype).reshape(entry.shape)


def read_header(stream: BinaryIO, expected: str) -> SafetensorsHeader:
    """Return the header of a safetensors file.

    Args:
        stream: of the file.
        expected: in an error, such as "a safetensors file NAME".

    Raises:
        InputError: another file, an incomplete one, a header of more than 16 MiB, a tensor whose bytes are not those
            of its shape, overlap or leave gaps, or one of a dtype that torch does not have.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(_HEAD_BYTES)
    try:
        return _header(stream, head, size)
    except ValueError as error:
        got, remedy = name_unread(head, str(error))
        raise InputError(expected=expected, got=got, remedy=remedy) from error
    except _UnknownDtypeError as error:
        raise InputError(expected=expected, got=str(error), remedy="save it in float32, float16 or bfloat16") from error


class _UnknownDtypeError(Exception):
    """A dtype that torch does not have."""


def _header(stream: BinaryIO, head: bytes, size: int) -> SafetensorsHeader:
    """Parse and check a header; a ValueError says what is wrong."""
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if head[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise ValueError("a file without header")
    if start > size:
        raise ValueError(f"an incomplete file, which ends within its header of {start:,} bytes")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes, where at most {_MAX_HEADER_BYTES:,} are read")
    stream.seek(_LENGTH_BYTES)
    try:
        values: dict[str, Any] = parse_json(stream.read(length), _MAX_HEADER_BYTES)
        metadata = _TEXTS.validate_python(values.pop(_METADATA, None) or {})
        entries = _ENTRIES.validate_python(values)
    except ValidationError as error:
        raise ValueError(f"a damaged file ({reasons(error, 1)})") from error
    except ValueError as error:
        raise ValueError(f"a damaged file ({error})") from error
    _check_bytes(entries, start, size)
    return SafetensorsHeader(entries, metadata, start)


def _check_bytes(entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Check that tensors have the bytes of their shapes, and lie one after the other to the end of the file."""
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise _UnknownDtypeError(f"tensors of the type {entry.dtype!r}, which torch does not have")
        is_huge = math.prod(max(1, side) for side in entry.shape) >= _MAX_ELEMENTS  # also of a tensor without elements
        if is_huge or entry.num_bytes != math.prod(entry.shape) * _DTYPES[entry.dtype][1]:
            described = f"type {entry.dtype} and shape {list(entry.shape)} with {entry.num_bytes} bytes"
            raise ValueError(f"a damaged file ({name} of {described})")
    end = 0
    for first, last, name in sorted((*entry.data_offsets, name) for name, entry in entries.items()):
        if first != end:
            raise ValueError(f"a damaged file ({name} begins at byte {first} of the tensors, and not at {end})")
        end = last
    if start + end > size:
        raise ValueError(f"{size:,} of its {start + end:,} bytes")
    if start + end < size:
        raise ValueError(f"a damaged file ({size - start - end:,} bytes after its tensors)")
