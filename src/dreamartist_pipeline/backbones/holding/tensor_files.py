"""Files of tensors, safetensors or pickled by torch: names and shapes first, contents one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dreamartist_pipeline.backbones.holding.parts import StoredTensor
from dreamartist_pipeline.core.unread_files import is_pickled, name_unread, unpickled
from dreamartist_pipeline.errors import InputError

_HEAD_BYTES = 512
_LENGTH_BYTES, _METADATA = 8, "__metadata__"  # at the start of a safetensors file; an entry of its header
_DTYPES = {  # by their names in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WRAPPER = "state_dict"
_ZIP = b"PK\x03\x04"


class _Ignored:
    """Stands for classes of trainers, which checkpoints have as keys beside their weights; never called."""


_INERT: list[Any] = [(_Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of a file, by its content whatever it is called; tensors in `state_dict` come out of it.

    Raises:
        InputError: no file of tensors, or one that runs code when it is loaded.
    """
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if is_pickled(head):
        with _named(file):
            content = _unpickle(file, is_zip=head.startswith(_ZIP))
        return {
            str(name): StoredTensor(tuple(tensor.shape), partial(content.__getitem__, name))
            for name, tensor in content.items()
            if isinstance(tensor, torch.Tensor)
        }
    start, entries = _header(file)
    return {name: _stored(file, start, name, entry) for name, entry in entries.items() if name != _METADATA}


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, {} for others."""
    with file.open("rb") as stream:
        if is_pickled(stream.read(_HEAD_BYTES)):
            return {}
    return dict(_header(file)[1].get(_METADATA, {}))


def is_whole(file: Path) -> bool:
    """Return whether a safetensors file has the length given in its header; True for other files."""
    if file.suffix != ".safetensors":
        return True
    try:
        start, entries = _header(file)
    except InputError:
        return False
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != _METADATA]
    return file.stat().st_size == start + max(ends, default=0)


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a safetensors file begin, and name -> dtype, shape and offsets of each.

    Raises:
        InputError: another file.
    """
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        stream.seek(_LENGTH_BYTES)
        try:
            if not 0 < length <= file.stat().st_size - _LENGTH_BYTES:
                raise ValueError("no header of a safetensors file")
            entries: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            got, remedy = name_unread(head, error)
            raise InputError(expected=f"a file of tensors at {file}", got=got, remedy=remedy) from error
    return _LENGTH_BYTES + length, entries


def _stored(file: Path, start: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    """Return the tensor that an entry of a header describes.

    Raises:
        InputError: another dtype, or offsets that do not fit the shape.
    """
    shape, dtype, (first, end) = tuple(entry["shape"]), _DTYPES.get(entry["dtype"]), entry["data_offsets"]
    if dtype is None or end - first != math.prod(shape) * dtype.itemsize:
        raise InputError(
            expected=f"a file of dense tensors at {file}",
            got=f"{name} of dtype {entry['dtype']}, shape {shape} and {end - first} bytes",
            remedy="download the model again, in full or half precision",
        )
    return StoredTensor(shape, partial(_read, file, start + first, dtype, shape))


def _read(file: Path, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Read one tensor into memory of its own: a mapped file would keep its pages, and must not change."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    content = bytearray(math.prod(shape) * dtype.itemsize)
    with file.open("rb") as stream:
        stream.seek(start)
        stream.readinto(content)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _unpickle(file: Path, *, is_zip: bool) -> Mapping[Any, Any]:
    with torch.serialization.safe_globals(_INERT):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)  # older files cannot be mapped
    while isinstance(content, Mapping) and isinstance(content.get(_WRAPPER), Mapping):
        content = content[_WRAPPER]
    if not isinstance(content, Mapping):
        return {}
    sections = {name: each for name, each in content.items() if isinstance(each, Mapping)}
    inner = {f"{name}:{key}": tensor for name, section in sections.items() for key, tensor in section.items()}
    return {**content, **inner}


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Convert what the unpickler raises, which on arbitrary bytes is anything."""
    try:
        yield
    except Exception as error:
        raise unpickled(error, file.name, "weights") from error
