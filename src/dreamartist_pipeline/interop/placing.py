"""Assignment of the tensors of a LoRA file to the base model's layers, shared by the readers of all formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dreamartist_pipeline.core.lora_factors import check_complete
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.safetensors_bytes import read_tensors

_SHOWN = 12  # unknown keys in an error: a file for another model has hundreds

Layer = tuple[str, str]
"""(network, module name)"""


def read_parts(
    file: bytes, name: str, form: str, place: Callable[[str], tuple[Layer, str] | None]
) -> dict[Layer, dict[str, torch.Tensor]]:
    """Return the placed tensors of a LoRA file; see `place_tensors`.

    Raises:
        InputError: not a safetensors file, one without tensors, or see `place_tensors`.
    """
    tensors = read_tensors(file, name)
    if not tensors:
        raise InputError(expected=f"{name} to hold a LoRA", got="no tensors", remedy="give another file")
    return place_tensors(tensors, name, form, place)


def place_tensors(
    tensors: Mapping[str, torch.Tensor], name: str, form: str, place: Callable[[str], tuple[Layer, str] | None]
) -> dict[Layer, dict[str, torch.Tensor]]:
    """Return layer -> its "down", "up" and optional "alpha" and "bias", float32, of a LoRA file.

    Args:
        tensors: of the file.
        name: the file's name in an error.
        form: the format's name in an error.
        place: key -> layer and part; None for an unknown key.

    Raises:
        InputError: unknown keys (the first are listed), half a pair, a duplicate tensor, or inconsistent shapes.
    """
    parts: dict[Layer, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if (found := place(key)) is None:
            unknown.append(key)
            continue
        at, part = found
        if part in parts.get(at, ()):
            raise InputError(
                expected=f"every tensor once in {name}",
                got=f"{part} of {'.'.join(at)} twice, also as {key!r}",
                remedy="make or download the file again",
            )
        parts.setdefault(at, {})[part] = tensor.float()
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise InputError(
            expected=f"{name} to hold {form} for layers of this base model",
            got=f"{len(unknown)} unknown keys: {', '.join(sorted(unknown)[:_SHOWN])}{more}",
            remedy="use the base model and the format it was made for",
        )
    for at, members in parts.items():
        check_complete(members, ".".join(at), name)
    return parts


def place_by_suffix(
    key: str, suffixes: Mapping[str, str], layer_of: Callable[[str], Layer | None]
) -> tuple[Layer, str] | None:
    """Return the layer and part of a key that consists of a layer's name and the suffix of a part."""
    suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
    at = layer_of(key.removesuffix(suffix)) if suffix else None
    return (at, suffixes[suffix]) if suffix and at else None
