"""LoRA in the kohya format, the one that ComfyUI, A1111, Forge and diffusers all load.

`X.lora_down.weight`, `X.lora_up.weight` and the scalar `X.alpha`; readers apply up · down · alpha / rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.layer_names import layers_by_name
from dreamartist_pipeline.interop.placing import build_adapter, place_by_suffix, read_parts
from dreamartist_pipeline.interop.safetensors_bytes import tensor_bytes, write_tensors

ALPHA = 1.0
"""One constant for the whole file: diffusers silently mis-scales a file whose alphas differ."""

_SUFFIXES = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}


def write_kohya(adapter: BranchAdapter, facts: FileFacts, dtype: torch.dtype) -> bytes:
    """Return one branch's adapter as a kohya file: alpha is `ALPHA` everywhere, the true scale is in `lora_up`.

    There is no place for a bias, see `expressible.check_expressible`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for network, layers in adapter.networks.items():
        for layer, factors in layers.items():
            name = facts.names.kohya(network, layer)
            down, up = factors.balanced_for_scale(ALPHA / factors.rank)
            tensors[f"{name}.lora_down.weight"] = down.to(dtype)
            tensors[f"{name}.lora_up.weight"] = up.to(dtype)
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA, dtype=dtype)
    return write_tensors(tensors, _metadata(adapter, facts, tensors))


def _metadata(adapter: BranchAdapter, facts: FileFacts, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    ranks = [factors.rank for layers in adapter.networks.values() for factors in layers.values()]
    return {
        "ss_output_name": facts.title,
        "ss_base_model_version": facts.names.kohya_version,
        "ss_v2": str(facts.names.kohya_version.startswith("sd_v2")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(ALPHA),
        "sshs_model_hash": hashlib.sha256(tensor_bytes(write_tensors(tensors, {}))).hexdigest(),
        **facts.modelspec("lora"),
    }


def read_kohya(file: bytes, name: str, modules: Mapping[str, Sequence[str]], names: FileNames) -> BranchAdapter:
    """Return a kohya file's adapter, in float32.

    Args:
        file: its bytes.
        name: what to call it in an error.
        modules: network -> the names of the base model's modules.
        names: what files call them.

    Raises:
        InputError: not a safetensors file, keys that no module explains (the first are listed), or half a pair.
    """
    known = layers_by_name(modules, names, kohya=True)
    parts = read_parts(file, name, "the kohya format", lambda key: place_by_suffix(key, _SUFFIXES, known.get))
    return build_adapter({at: _factors(part) for at, part in parts.items()}, name)


def _factors(part: Mapping[str, torch.Tensor]) -> LoRAFactors:
    rank = part["down"].shape[0]
    return LoRAFactors(part["down"], part["up"], float(part["alpha"]) / rank if "alpha" in part else 1.0)
