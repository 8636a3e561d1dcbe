"""Placing the tensors of a LoRA file in the base model's layers; shared by the readers of all formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, LoRAFactors


def refuse_unknown(keys: Sequence[str], name: str, form: str) -> None:
    """Raise an InputError that lists keys nobody can place."""
    if keys:
        raise InputError(
            f"expected {name} to hold {form} for layers of this base model; got {len(keys)} unknown keys: "
            f"{', '.join(sorted(keys))}; load it with the base model and the format it was made for"
        )


def check_pair(part: Mapping[str, torch.Tensor], name: str, at: tuple[str, str]) -> None:
    """Raise an InputError when a layer lacks one of its two factors, or when they do not belong together."""
    whole = {"down", "up"} <= part.keys() and min(part["down"].dim(), part["up"].dim()) >= 2
    if not whole or part["down"].shape[0] != part["up"].shape[1]:
        came = {factor: tuple(tensor.shape) for factor, tensor in sorted(part.items())}
        raise InputError(
            f"expected {name} to hold down [rank, in] and up [out, rank] for {'.'.join(at)}; got {came}; "
            "the file is incomplete: make or download it again"
        )


def build_adapter(factors: Mapping[tuple[str, str], LoRAFactors], name: str) -> BranchAdapter:
    """Gather (network, layer) -> factors.

    Raises:
        InputError: there are none.
    """
    if not factors:
        raise InputError(f"expected {name} to hold a LoRA; got no tensors; give another file")
    networks: dict[str, dict[str, LoRAFactors]] = {}
    for (network, layer), value in sorted(factors.items()):
        networks.setdefault(network, {})[layer] = value
    return BranchAdapter(networks)
