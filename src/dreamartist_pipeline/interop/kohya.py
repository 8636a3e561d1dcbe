"""LoRA in the kohya format, which ComfyUI, A1111, Forge and diffusers load.

`X.lora_down.weight`, `X.lora_up.weight` and the scalar `X.alpha`; readers apply up · down · alpha / rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch

from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.layer_names import layers_by_name
from dreamartist_pipeline.interop.placing import place_by_suffix, read_parts
from dreamartist_pipeline.interop.safetensors_bytes import tensor_bytes, write_tensors

ALPHA = 1.0
"""The same for all layers: diffusers scales a file with different alphas wrongly."""

_SUFFIXES = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}


def write_kohya(adapter: BranchAdapter, facts: FileFacts, dtype: torch.dtype) -> bytes:
    """Return one branch's adapter as a kohya file: alpha is always `ALPHA`, the scale is folded into `lora_up`.

    The format has no bias, see `expressible.check_expressible`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for at, factors in adapter.by_layer().items():
        name = facts.names.kohya(*at)
        down, up = factors.balanced_for_scale(ALPHA / factors.rank)
        tensors[f"{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA, dtype=dtype)
    return write_tensors(tensors, _metadata(adapter, facts, tensors))


def _metadata(adapter: BranchAdapter, facts: FileFacts, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {
        "ss_output_name": facts.title,
        "ss_base_model_version": facts.names.kohya_version,
        "ss_v2": str(facts.names.kohya_version.startswith("sd_v2")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(factors.rank for factors in adapter.by_layer().values())),
        "ss_network_alpha": str(ALPHA),
        "sshs_model_hash": hashlib.sha256(tensor_bytes(write_tensors(tensors, {}))).hexdigest(),
        **facts.modelspec("lora"),
    }


def read_kohya(file: bytes, name: str, modules: Mapping[str, Collection[str]], names: FileNames) -> BranchAdapter:
    """Return a kohya file's adapter, in float32.

    Args:
        file: its bytes.
        name: its name in an error.
        modules: network -> the names of the base model's modules.
        names: their names in files.

    Raises:
        InputError: not a safetensors file, an invalid LoRA (see `read_parts`), or an ambiguous name.
    """
    known = _known_names(modules, names)
    parts = read_parts(file, name, "the kohya format", lambda key: place_by_suffix(key, _SUFFIXES, known.get))
    scales = {at: float(p["alpha"]) / len(p["down"]) if "alpha" in p else 1.0 for at, p in parts.items()}
    return BranchAdapter.of_layers({at: LoRAFactors(p["down"], p["up"], scales[at]) for at, p in parts.items()})


def _known_names(modules: Mapping[str, Collection[str]], names: FileNames) -> dict[str, tuple[str, str]]:
    """Return name in files -> (network, layer) of all modules, in every spelling.

    Old converters write `lora_te1_` for the only text encoder, and files made with transformers 5 may omit
    `text_model_`. The layers of a UNet have their names in diffusers or those in Stable Diffusion's original code.
    """
    known = layers_by_name(modules, names, kohya=True)
    spellings: dict[str, tuple[str, str]] = {}
    for network, layer in known.values():
        inner = layer.removeprefix(names.outer_modules.get(network, "")).replace(".", "_")
        outer = names.external(network, layer).replace(".", "_")
        for prefix in (names.kohya_prefixes[network], *names.kohya_aliases.get(network, ())):
            spellings |= {f"{prefix}{inner}": (network, layer), f"{prefix}{outer}": (network, layer)}
        if network == "unet" and (original := names.original_unet_names.get(layer)):
            spellings[names.kohya_prefixes[network] + original.replace(".", "_")] = (network, layer)
    return spellings | known
