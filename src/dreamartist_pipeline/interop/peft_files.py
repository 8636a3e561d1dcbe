"""LoRA in the format of peft and diffusers: `unet.<module>.lora_A.weight` and `lora_B.weight`.

Only diffusers loads all of it: ComfyUI silently ignores the attention layers of the UNet.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, has_bias
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.layer_names import layers_by_name
from dreamartist_pipeline.interop.placing import place_by_suffix, read_parts
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, write_tensors

_SUFFIXES = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_B.bias": "bias"}
_CONFIG = "lora_adapter_metadata"  # key of peft's LoraConfig in diffusers' metadata


def write_peft(adapter: BranchAdapter, facts: FileFacts, dtype: torch.dtype) -> bytes:
    """Return one branch's adapter as a peft file without configuration; the scale is folded into `lora_B`.

    If a layer has a bias (peft's `lora_bias`), all layers of its network get one: the option applies to all of them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for network, layers in adapter.networks.items():
        for layer, factors in layers.items():
            name = f"{network}.{facts.names.external(network, layer)}"
            tensors[f"{name}.lora_A.weight"] = factors.down.to(dtype)
            tensors[f"{name}.lora_B.weight"] = factors.up_for_scale(1.0).to(dtype)
            if has_bias(layers):
                tensors[f"{name}.lora_B.bias"] = factors.bias_for_scale(1.0).to(dtype)
    return write_tensors(tensors, facts.modelspec("lora"))


def read_peft(file: bytes, name: str, modules: Mapping[str, Collection[str]], names: FileNames) -> BranchAdapter:
    """Return a peft file's adapter, in float32, with alpha from diffusers' metadata if it has them.

    Args:
        file: its bytes.
        name: its name in an error.
        modules: network -> the names of the base model's modules.
        names: their names in files.

    Raises:
        InputError: not a safetensors file, an invalid LoRA (see `read_parts`), or a configuration other than one
            alpha for all layers.
    """
    known = layers_by_name(modules, names, kohya=False)

    def layer_of(stem: str) -> tuple[str, str] | None:
        network, _, layer = stem.partition(".")
        return known.get(f"{network}.{names.external(network, layer)}")  # transformers 5 omits `text_model.`

    parts = read_parts(file, name, "the peft format", lambda key: place_by_suffix(key, _SUFFIXES, layer_of))
    config = _config(file, name)
    return BranchAdapter.of_layers(
        {
            at: LoRAFactors(p["down"], p["up"], _scale(config, at[0], len(p["down"]), name), p.get("bias"))
            for at, p in parts.items()
        }
    )


def _config(file: bytes, name: str) -> Mapping[str, Any]:
    """Return peft's configuration in diffusers' metadata, or {}.

    Raises:
        InputError: it is not a JSON object, or an alpha is not a number.
    """
    text = read_metadata(file).get(_CONFIG, "{}")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not all(
        isinstance(value, int | float) for key, value in config.items() if key.endswith(".lora_alpha")
    ):
        raise InputError(
            expected=f"a JSON object with numbers for lora_alpha as {_CONFIG} of {name}",
            got=f"{text[:80]!r}",
            remedy="save it with diffusers",
        )
    return config


def _scale(config: Mapping[str, Any], network: str, rank: int, name: str) -> float:
    """Return alpha / rank of the configuration, or 1 without one, as diffusers does."""
    if f"{network}.lora_alpha" not in config:
        return 1.0
    if config.get(f"{network}.alpha_pattern") or config.get(f"{network}.use_rslora"):
        raise InputError(
            expected=f"{name} to scale every layer by lora_alpha / rank",
            got=f"alpha_pattern or use_rslora in its {_CONFIG}",
            remedy="fold the scale into lora_B, or save it in the kohya format",
        )
    return float(config[f"{network}.lora_alpha"]) / rank
