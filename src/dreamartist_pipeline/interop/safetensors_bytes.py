"""Safetensors files as bytes: written the same way every time, read with a message that names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dreamartist_pipeline.errors import InputError

if TYPE_CHECKING:
    import torch


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file; equal content gives equal bytes."""
    from safetensors.torch import save

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return sort_header(save(contiguous, metadata=dict(metadata) or None))  # {} without tensors makes a broken header


def read_tensors(file: bytes, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file.

    Args:
        file: its bytes.
        name: what to call it in an error.

    Raises:
        InputError: not a whole safetensors file, or numbers of a type that torch does not have.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(file))
    except (SafetensorError, KeyError) as error:  # KeyError: an exotic type, such as F4
        raise InputError(
            expected=f"a safetensors file {name}",
            got=f"something else ({error})",
            remedy="give the right file, or make it again",
        ) from error


def read_metadata(file: bytes) -> dict[str, str]:
    """Return the metadata of a whole safetensors file; empty when it has none."""
    metadata: dict[str, str] = _header(file).get("__metadata__", {})
    return metadata


def sort_header(file: bytes) -> bytes:
    """Return a safetensors file with its header in alphabetical order.

    The library writes the metadata in the random order of a hash map, another one in every process. The tensors
    themselves it orders by type and name. Layout: length of the header (8 bytes, little-endian), header, tensors.
    """
    header = json.dumps(_header(file), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors start aligned
    return len(encoded).to_bytes(8, "little") + encoded + tensor_bytes(file)


def tensor_bytes(file: bytes) -> bytes:
    """Return what follows the header of a safetensors file: the tensors, whatever the metadata say."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def _header(file: bytes) -> dict[str, dict[str, str]]:
    length = int.from_bytes(file[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(file[8 : 8 + length])
    return header
