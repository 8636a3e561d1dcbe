"""Files pickled by torch (`.pt`, `.bin`, `.ckpt`), loaded without running code from untrusted sources."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from dreamartist_pipeline.core.unread_files import unpickled
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
    content = load_pickled(file, name, holds)
    if isinstance(content, torch.Tensor):
        raise InputError(
            expected=f"{holds} in {name}",
            got=f"a single tensor {list(content.shape)} without a name",
            remedy="save it as safetensors under a name, such as emb_params for a trigger word",
        )
    if not isinstance(content, Mapping):
        raise InputError(expected=f"{holds} in {name}", got=f"a {type(content).__name__}", remedy="give another file")
    return content


def load_pickled(file: bytes, name: str, holds: str) -> object:
    """Return the content of a pickled file, of any type; see `load_weights`.

    Raises:
        InputError: not such a file, or a file that runs code when it is loaded.
    """
    try:
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):  # in the first embeddings
            return torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except Exception as error:  # on arbitrary bytes the unpickler raises anything: KeyError, IndexError, …
        raise unpickled(error, name, holds) from error


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


def dense_tensor(value: object, key: object, name: str) -> torch.Tensor:
    """Return a value of a pickled file that is a tensor with all its elements in the file.

    A pickled tensor may be an expanded view: small in the file, of any size when it is copied.

    Args:
        value: the value of `key` in the file.
        key: its key, for an error.
        name: the file's name in an error.

    Raises:
        InputError: not a tensor, or one that is sparse, quantized, on the meta device or an expanded view.
    """
    if not isinstance(value, torch.Tensor):
        got = f"a {type(value).__name__}"
    elif value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        got = "a sparse, quantized or meta tensor"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        stored = value.untyped_storage().nbytes() // value.element_size()
        got = f"a view of shape {tuple(value.shape)} of {stored} elements"
    else:
        return value.detach()
    raise InputError(expected=f"a dense tensor {key!r} in {name}", got=got, remedy="save the file again")
