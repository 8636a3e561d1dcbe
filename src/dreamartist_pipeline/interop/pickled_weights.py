"""Files pickled by torch (`.pt`, `.bin`, `.ckpt`), loaded without running code from untrusted sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dreamartist_pipeline.decoding.torch_files import load_torch
from dreamartist_pipeline.errors import InputError


def load_weights(file: bytes, name: str, holds: str) -> Mapping[str, Any]:
    """Return the mapping in a pickled file.

    Args:
        file: its bytes.
        name: its name in an error.
        holds: the expected content in an error, such as "an embedding".

    Raises:
        InputError: not such a file, no mapping, or a file that runs code when it is loaded.
    """
    content = load_torch(file, name, holds)
    if isinstance(content, torch.Tensor):
        raise InputError(
            expected=f"{holds} in {name}",
            got=f"a single tensor {list(content.shape)} without a name",
            remedy="save it as safetensors under a name, such as emb_params for a trigger word",
        )
    if not isinstance(content, Mapping):
        raise InputError(expected=f"{holds} in {name}", got=f"a {type(content).__name__}", remedy="give another file")
    return content


def flat_names(content: Mapping[str, Any]) -> dict[str, object]:
    """Return `section:key` -> value of a file in sections, such as `{"lora": {key: tensor}}`.

    Values outside of sections keep their names.
    """
    flat: dict[str, object] = {}
    for section, value in content.items():
        if isinstance(value, Mapping):
            flat |= {f"{section}:{key}": inner for key, inner in value.items()}
        else:
            flat[str(section)] = value
    return flat
