"""Files that torch pickled (`.pt`, `.bin`, `.ckpt`), opened without running or believing anything that is in them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch

from dreamartist_pipeline.errors import InputError


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
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):  # a dictionary, in the first embeddings
            content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no pickle the unpickler fails by chance: KeyError, IndexError, …
        raise InputError(
            expected=f"{holds} in {name} that loads without running code",
            got=f"{_refused(error)}",
            remedy="make or download it again, or have the tool that made it save plain tensors",
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(expected=f"{holds} in {name}", got=f"a {type(content).__name__}", remedy="give another file")
    return content


def _refused(error: Exception) -> str:
    """Say why a file was not opened; torch's own words advise to trust it."""
    if call := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"one that asks for {call[1]}"
    return f"a damaged or unusual one ({type(error).__name__})"


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
        got = f"a {type(value).__name__}"
    elif value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        got = "a sparse, quantized or empty (meta) one"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        stored = value.untyped_storage().nbytes() // value.element_size()
        got = f"a view of shape {tuple(value.shape)} of {stored} numbers"
    else:
        return value.detach()
    raise InputError(
        expected=f"a tensor with all its numbers as {key!r} in {name}", got=got, remedy="save the file again"
    )
