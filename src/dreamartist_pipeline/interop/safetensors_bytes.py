"""Safetensors files as bytes, written deterministically."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dreamartist_pipeline.decoding.safetensors_files import SafetensorsHeader, read_header

if TYPE_CHECKING:
    import torch


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file; equal content gives equal bytes."""
    from safetensors.torch import save

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    file = save(contiguous, metadata=dict(metadata) or None)  # {} without tensors makes a broken header
    # The library sorts tensors by type and name, but writes metadata in random order. The layout is the length of the
    # header (8 bytes, little-endian), header, tensors.
    header = json.dumps(_header(file), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # aligns the tensors
    return b"".join((len(header).to_bytes(8, "little"), header, tensor_bytes(file)))


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
    return memoryview(file)[8 + int.from_bytes(file[:8], "little") :]


def _header(file: bytes) -> dict[str, dict[str, str]]:
    length = int.from_bytes(file[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(file[8 : 8 + length])
    return header
