"""Files of tensors, safetensors or pickled by torch: names and shapes first, contents one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dreamartist_pipeline.backbones.holding.parts import StoredTensor
from dreamartist_pipeline.decoding.safetensors_files import SafetensorsHeader, read_header
from dreamartist_pipeline.decoding.torch_files import dense_tensor, load_torch
from dreamartist_pipeline.decoding.unread_files import is_pickled
from dreamartist_pipeline.errors import InputError

_HEAD_BYTES = 512
_WRAPPER, _MAX_WRAPPERS = "state_dict", 4  # a pickled dictionary may hold itself


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of a file, by its content whatever it is called; tensors in `state_dict` come out of it.

    Raises:
        InputError: no file of tensors, or one that runs code when it is loaded.
    """
    if _is_pickled(file):
        dense = {
            str(name): dense_tensor(tensor, name, str(file))
            for name, tensor in _unpickle(file).items()
            if isinstance(tensor, torch.Tensor)
        }
        return {name: StoredTensor(tuple(tensor.shape), partial(_itself, tensor)) for name, tensor in dense.items()}
    header = _header(file)
    return {name: StoredTensor(each.shape, partial(_read, file, header, name)) for name, each in header.tensors.items()}


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, {} for a file that torch pickled.

    Raises:
        InputError: another file.
    """
    return {} if _is_pickled(file) else dict(_header(file).metadata)


def is_whole(file: Path) -> bool:
    """Return whether a safetensors file has the length given in its header; True for other files."""
    if file.suffix != ".safetensors":
        return True
    try:
        _header(file)
    except InputError:
        return False
    return True


def _is_pickled(file: Path) -> bool:
    with file.open("rb") as stream:
        return is_pickled(stream.read(_HEAD_BYTES))


def _header(file: Path) -> SafetensorsHeader:
    with file.open("rb") as stream:
        return read_header(stream, f"a file of tensors at {file}")


def _read(file: Path, header: SafetensorsHeader, name: str) -> torch.Tensor:
    with file.open("rb") as stream:
        return header.read(stream, name)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _unpickle(file: Path) -> Mapping[Any, Any]:
    content = load_torch(file, file.name, "weights")
    for _ in range(_MAX_WRAPPERS):
        if isinstance(content, Mapping) and isinstance(content.get(_WRAPPER), Mapping):
            content = content[_WRAPPER]
    if not isinstance(content, Mapping):
        return {}
    sections = {name: each for name, each in content.items() if isinstance(each, Mapping)}
    inner = {f"{name}:{key}": tensor for name, section in sections.items() for key, tensor in section.items()}
    return {**content, **inner}
