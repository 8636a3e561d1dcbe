"""Files that torch pickled (`.pt`, `.bin`, `.ckpt`), opened without running or believing anything that is in them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from dreamartist_pipeline.core.errors import InputError


def load_weights(file: bytes, name: str, holds: str) -> Mapping[str, Any]:
    """Return the mapping that such a file holds.

    Args:
        file: its bytes.
        name: what to call it in an error.
        holds: what it should hold, for an error: "an embedding".

    Raises:
        InputError: not such a file, no mapping, or something that needs code to be run to be read.
    """
    try:
        content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no pickle the unpickler fails by chance: KeyError, IndexError, …
        first_line = str(error).partition("\n")[0]  # torch goes on with advice to trust the file
        raise InputError(
            f"expected {holds} in {name} that loads without running code; got {type(error).__name__}: "
            f"{first_line}; give it as .safetensors"
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(f"expected {holds} in {name}; got a {type(content).__name__}; give another file")
    return content


def dense_tensor(value: object, key: object, name: str) -> torch.Tensor:
    """Return a value of such a file that is a tensor, and whose numbers are all in the file.

    A pickled tensor may be a view that repeats a few numbers: small in the file, and any size once it is copied.

    Args:
        value: what the file holds under `key`.
        key: where, for an error.
        name: what to call the file in an error.

    Raises:
        InputError: no tensor, a sparse one, one without numbers (meta), or a view of fewer numbers than it has.
    """
    if not isinstance(value, torch.Tensor):
        came = f"a {type(value).__name__}"
    elif value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        came = "a sparse, quantized or empty (meta) one"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        stored = value.untyped_storage().nbytes() // value.element_size()
        came = f"a view of shape {tuple(value.shape)} of {stored} numbers"
    else:
        return value.detach()
    raise InputError(f"expected a tensor with all its numbers as {key!r} in {name}; got {came}; save the file again")
