"""Safetensors files, written deterministically, and read from bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dreamartist_pipeline.decoding.safetensors_files import SafetensorsHeader, read_header

if TYPE_CHECKING:
    import torch


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file; equal content gives equal bytes."""
    from safetensors.torch import save

    file = save(*_savable(tensors, metadata))
    return b"".join((file[:_LENGTH_BYTES], _sorted(file[_LENGTH_BYTES : _header_end(file)]), tensor_bytes(file)))


def save_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write the file of `write_tensors` without a copy of the tensors in memory."""
    from safetensors.torch import save_file

    contiguous, written = _savable(tensors, metadata)
    save_file(contiguous, path, written)
    with path.open("rb+") as file:
        header = file.read(_header_end(file.read(_LENGTH_BYTES)) - _LENGTH_BYTES)
        file.seek(_LENGTH_BYTES)
        file.write(_sorted(header))


def _savable(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """Return what the library can write: {} without tensors would make a broken header."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata) or None


def read_tensors(file: bytes, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file.

    Args:
        file: its bytes.
        name: its name in an error.

    Raises:
        InputError: not a complete safetensors file, or one with a dtype that torch does not have.
    """
    header, stream = header_of(file, name), io.BytesIO(file)
    return {key: header.read(stream, key) for key in header.tensors}


def header_of(file: bytes, name: str) -> SafetensorsHeader:
    """Return the header of a safetensors file: names, shapes and metadata.

    Args:
        file: its bytes.
        name: its name in an error.

    Raises:
        InputError: see `read_tensors`.
    """
    return read_header(io.BytesIO(file), f"a safetensors file {name}")


def read_metadata(file: bytes) -> dict[str, str]:
    """Return the metadata of a complete safetensors file, or {}."""
    return dict(header_of(file, "").metadata)


def tensor_bytes(file: bytes) -> memoryview:
    """Return the tensors of a safetensors file, without header and metadata and without a copy."""
    return memoryview(file)[_header_end(file) :]


# The layout is the length of the header (little-endian), the header padded with spaces, and the tensors.
_LENGTH_BYTES = 8


def _header_end(file: bytes) -> int:
    """Return where the tensors start; the first bytes of the file are enough."""
    return _LENGTH_BYTES + int.from_bytes(file[:_LENGTH_BYTES], "little")


def _sorted(header: bytes) -> bytes:
    """Return a header of the same length, sorted: the library writes metadata in random order."""
    return (
        json.dumps(json.loads(header), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        .encode()
        .ljust(len(header))
    )
