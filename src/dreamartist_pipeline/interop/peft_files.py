"""LoRA as peft and diffusers write it: `unet.<module>.lora_A.weight` and `lora_B.weight`.

Only diffusers takes all of it: ComfyUI silently drops the attention layers of the UNet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, has_bias
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.layer_names import layers_by_name
from dreamartist_pipeline.interop.placing import build_adapter, place_by_suffix, read_parts
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, write_tensors

_SUFFIXES = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_B.bias": "bias"}
_CONFIG = "lora_adapter_metadata"  # diffusers' entry for peft's LoraConfig


def write_peft(adapter: BranchAdapter, facts: FileFacts, dtype: torch.dtype) -> bytes:
    """Return one branch's adapter as a peft file; the scale is in `lora_B`, so that readers need no configuration.

    Where a network has a bias (peft's `lora_bias`), every layer has: that option is one for all of them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for network, layers in adapter.networks.items():
        for layer, factors in layers.items():
            name = f"{network}.{facts.names.external(network, layer)}"
            down, up = factors.balanced_for_scale(1.0)
            tensors[f"{name}.lora_A.weight"] = down.to(dtype)
            tensors[f"{name}.lora_B.weight"] = up.to(dtype)
            if has_bias(layers):
                tensors[f"{name}.lora_B.bias"] = factors.bias_for_scale(1.0).to(dtype)
    return write_tensors(tensors, facts.modelspec("lora"))


def read_peft(file: bytes, name: str, modules: Mapping[str, Sequence[str]], names: FileNames) -> BranchAdapter:
    """Return a peft file's adapter, in float32; alpha comes from diffusers' metadata when they are there.

    Args:
        file: its bytes.
        name: what to call it in an error.
        modules: network -> the names of the base model's modules.
        names: what files call them.

    Raises:
        InputError: not a safetensors file, keys that no module explains (the first are listed), half a pair, or a
            configuration other than one alpha for all layers.
    """
    known = layers_by_name(modules, names, kohya=False)

    def layer_of(stem: str) -> tuple[str, str] | None:
        network, _, layer = stem.partition(".")
        return known.get(f"{network}.{names.external(network, layer)}")  # transformers 5 leaves `text_model.` out

    parts = read_parts(file, name, "the peft format", lambda key: place_by_suffix(key, _SUFFIXES, layer_of))
    config = _config(file, name)
    factors = {
        at: LoRAFactors(part["down"], part["up"], _scale(config, at[0], part["down"].shape[0], name), part.get("bias"))
        for at, part in parts.items()
    }
    return build_adapter(factors, name)


def _config(file: bytes, name: str) -> Mapping[str, Any]:
    """Return diffusers' entry of the metadata, `{}` without one.

    Raises:
        InputError: it is no JSON object, or an alpha in it is no number.
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
            remedy="save it by diffusers",
        )
    return config


def _scale(config: Mapping[str, Any], network: str, rank: int, name: str) -> float:
    """Return alpha / rank as the configuration says, 1 without one (diffusers' convention)."""
    if f"{network}.lora_alpha" not in config:
        return 1.0
    if config.get(f"{network}.alpha_pattern") or config.get(f"{network}.use_rslora"):
        raise InputError(
            expected=f"{name} to scale every layer by lora_alpha / rank",
            got=f"alpha_pattern or use_rslora in its {_CONFIG}",
            remedy="fold the scale into lora_B, or save it in the kohya format",
        )
    return float(config[f"{network}.lora_alpha"]) / rank
