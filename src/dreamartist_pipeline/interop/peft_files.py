"""LoRA with diffusers' module names: `unet.<module>.lora_A.weight` and `lora_B.weight`, and other spellings.

Files are written in peft's spelling. Only diffusers loads all of it: ComfyUI silently ignores the attention layers of
the UNet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.decoding.json_text import parse_json
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, has_bias
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.layer_names import layers_by_name
from dreamartist_pipeline.interop.placing import Layer, place_by_suffix, read_parts
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, write_tensors

_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    # diffusers' training scripts: UNet attention, text encoder
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    # the first versions of diffusers: attn1.processor.to_q_lora.down.weight
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    # OneTrainer's own backups
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_OLD_NAMES = (  # of the projections around which the first versions of diffusers had a module of their own
    (re.compile(r"\.processor\.(to_[qkv])$"), r".\1"),
    (re.compile(r"\.processor\.to_out$"), ".to_out.0"),
    (re.compile(r"\.self_attn\.to_([qkv]|out)$"), r".self_attn.\1_proj"),
)
_CONFIG = "lora_adapter_metadata"  # key of peft's LoraConfig in diffusers' metadata
_ALPHA = ".lora_alpha"
_PLAIN_PATTERN = re.compile(r"\^?[\w.]+")  # keys of alpha_pattern that are a module's name or its end


def write_peft(adapter: BranchAdapter, facts: FileFacts, dtype: torch.dtype) -> bytes:
    """Return one branch's adapter as a peft file without configuration; the scale is folded into `lora_B`.

    If a layer has a bias (peft's `lora_bias`), all layers of its network get one: the option applies to all of them.
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


def read_peft(file: bytes, name: str, modules: Mapping[str, Collection[str]], names: FileNames) -> BranchAdapter:
    """Return the adapter of a file whose keys are diffusers' module names, in float32.

    The factors are called as peft, or as any version of diffusers' training scripts calls them. The scale comes from
    diffusers' metadata where they are there, else from an alpha beside the factors; without either it is 1.

    Args:
        file: its bytes.
        name: its name in an error.
        modules: network -> the names of the base model's modules.
        names: their names in files.

    Raises:
        InputError: not a safetensors file, an invalid LoRA (see `read_parts`), or an invalid configuration.
    """
    known = layers_by_name(modules, names, kohya=False)

    def layer_of(stem: str) -> Layer | None:
        network, _, layer = stem.partition(".")
        if network not in modules:  # a file of the UNet alone, of the first versions of diffusers
            network, layer = "unet", stem
        for old, new in _OLD_NAMES:
            layer = old.sub(new, layer)
        return known.get(f"{network}.{names.external(network, layer)}")  # transformers 5 omits `text_model.`

    parts = read_parts(file, name, "the peft format", lambda key: place_by_suffix(key, _SUFFIXES, layer_of))
    configs = _configs(file, name)
    factors = {
        (network, layer): LoRAFactors(
            part["down"],
            part["up"],
            _scale(part, configs.get(network), (layer, names.external(network, layer))),
            part.get("bias"),
        )
        for (network, layer), part in parts.items()
    }
    return BranchAdapter.of_layers(factors)


@dataclass(frozen=True)
class _ScaleConfig:
    """What peft's LoraConfig of one network says about scales.

    Attributes:
        alpha: of every layer that no pattern names.
        patterns: (a layer's name or its end, its alpha), in the order in which peft looks.
        rank_stabilized: whether alpha is divided by the root of the rank (rsLoRA), not by the rank.
    """

    alpha: float
    patterns: tuple[tuple[str, float], ...]
    rank_stabilized: bool

    def alpha_of(self, layer_names: Sequence[str]) -> float:
        """Return a layer's alpha; it has one name in memory and perhaps another in files."""
        for pattern, alpha in self.patterns:
            if any(_is_named(layer, pattern) for layer in layer_names):
                return alpha
        return self.alpha


def _is_named(layer: str, pattern: str) -> bool:
    """Return whether a pattern is a layer's name or, without ^, the end of it (`get_pattern_key` of peft)."""
    plain = pattern.removeprefix("^")
    return layer == plain or (plain == pattern and layer.endswith(f".{plain}"))


def _scale(part: Mapping[str, torch.Tensor], config: _ScaleConfig | None, layer_names: Sequence[str]) -> float:
    rank = part["down"].shape[0]
    if config is not None:
        return config.alpha_of(layer_names) / (math.sqrt(rank) if config.rank_stabilized else rank)
    return float(part["alpha"]) / rank if "alpha" in part else 1.0


def _configs(file: bytes, name: str) -> dict[str, _ScaleConfig]:
    """Return network -> what diffusers' entry of the metadata says of its scales; nothing without an entry.

    Raises:
        InputError: it is no JSON object, or holds anything but numbers and names of layers where they belong.
    """
    text = read_metadata(file).get(_CONFIG, "{}")
    try:
        values = dict(parse_json(text))
        networks = [key.removesuffix(_ALPHA) for key in values if key.endswith(_ALPHA)]
        return {network: _scale_config(values, network) for network in networks}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            expected=f"a JSON object with numbers for lora_alpha and alpha_pattern as {_CONFIG} of {name}",
            got=f"{text[:80]!r}",
            remedy="save it with diffusers",
        ) from error


def _scale_config(values: Mapping[str, Any], network: str) -> _ScaleConfig:
    patterns = (values.get(f"{network}.alpha_pattern") or {}).items()
    if unreadable := [pattern for pattern, _ in patterns if not _PLAIN_PATTERN.fullmatch(pattern)]:
        raise ValueError(unreadable)
    return _ScaleConfig(
        alpha=float(values[f"{network}{_ALPHA}"]),
        patterns=tuple((pattern, float(alpha)) for pattern, alpha in patterns),
        rank_stabilized=bool(values.get(f"{network}.use_rslora")),
    )
