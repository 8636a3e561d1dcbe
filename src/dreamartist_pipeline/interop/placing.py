"""Placing the tensors of a LoRA file in the base model's layers; shared by the readers of all formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from dreamartist_pipeline.core.lora_factors import LoRAFactors, check_complete
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter
from dreamartist_pipeline.interop.safetensors_bytes import read_tensors

_SHOWN = 12  # keys in an error: those of a whole other model are hundreds

Layer = tuple[str, str]
"""(network, module name)"""


def read_parts(
    file: bytes, name: str, form: str, place: Callable[[str], tuple[Layer, str] | None]
) -> dict[Layer, dict[str, torch.Tensor]]:
    """Return layer -> its "down", "up" and perhaps "alpha" and "bias", float32, of a LoRA file.

    Args:
        file: its bytes.
        name: what to call it in an error.
        form: what to call its format in an error.
        place: key -> layer and part; None for a key that has no place.

    Raises:
        InputError: not a safetensors file, keys without a place (the first are listed), half a pair, or shapes that do
            not go together.
    """
    return place_tensors(read_tensors(file, name), name, form, place)


def place_tensors(
    tensors: Mapping[str, torch.Tensor], name: str, form: str, place: Callable[[str], tuple[Layer, str] | None]
) -> dict[Layer, dict[str, torch.Tensor]]:
    """Return what `read_parts` does, of tensors that have been read.

    Raises:
        InputError: keys without a place (the first are listed), half a pair, a tensor that is there twice, or shapes
            that do not go together.
    """
    parts: dict[Layer, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if (found := place(key)) is None:
            unknown.append(key)
        else:
            at, part = found
            if part in parts.get(at, ()):
                raise InputError(
                    expected=f"every tensor once in {name}",
                    got=f"{part} of {'.'.join(at)} twice, also as {key!r}",
                    remedy="make or download the file again",
                )
            parts.setdefault(at, {})[part] = tensor
    _refuse_unknown(unknown, name, form)
    for at, members in parts.items():
        check_complete(members, ".".join(at), name)
    return {at: {part: tensor.float() for part, tensor in members.items()} for at, members in parts.items()}


def place_by_suffix(
    key: str, suffixes: Mapping[str, str], layer_of: Callable[[str], Layer | None]
) -> tuple[Layer, str] | None:
    """Place a key that is a layer's name and one of these suffixes, each standing for a part."""
    suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
    at = layer_of(key.removesuffix(suffix)) if suffix else None
    return (at, suffixes[suffix]) if suffix and at else None


def _refuse_unknown(keys: Sequence[str], name: str, form: str) -> None:
    """Raise an InputError that lists keys nobody can place, as many as can be read."""
    if keys:
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise InputError(
            expected=f"{name} to hold {form} for layers of this base model",
            got=f"{len(keys)} unknown keys: {', '.join(sorted(keys)[:_SHOWN])}{more}",
            remedy="load it with the base model and the format it was made for",
        )


def build_adapter(factors: Mapping[tuple[str, str], LoRAFactors], name: str) -> BranchAdapter:
    """Gather (network, layer) -> factors.

    Raises:
        InputError: there are none.
    """
    if not factors:
        raise InputError(expected=f"{name} to hold a LoRA", got="no tensors", remedy="give another file")
    networks: dict[str, dict[str, LoRAFactors]] = {}
    for (network, layer), value in sorted(factors.items()):
        networks.setdefault(network, {})[layer] = value
    return BranchAdapter(networks)
