"""Files that torch pickled (`.pt`, `.bin`, `.ckpt`), opened without running anything that is in them."""

from __future__ import annotations

import io
import pickle
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
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first_line = str(error).partition("\n")[0]  # torch goes on with advice to trust the file
        raise InputError(
            f"expected {holds} in {name} that loads without running code; got {type(error).__name__}: "
            f"{first_line}; give it as .safetensors"
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(f"expected {holds} in {name}; got a {type(content).__name__}; give another file")
    return content
