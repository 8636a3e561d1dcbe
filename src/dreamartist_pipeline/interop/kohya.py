"""LoRA in the kohya format, the one that ComfyUI, A1111, Forge and diffusers all load.

`X.lora_down.weight`, `X.lora_up.weight` and the scalar `X.alpha`; readers apply up · down · alpha / rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, LoRAFactors
from dreamartist_pipeline.interop.layer_names import kohya_name, layers_by_name
from dreamartist_pipeline.interop.safetensors_bytes import read_tensors, tensor_bytes, write_tensors

ALPHA = 1.0
"""One constant for the whole file: diffusers silently mis-scales a file whose alphas differ."""

_SUFFIXES = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}


@dataclass(frozen=True)
class FileFacts:
    """What a file's metadata say about it.

    trigger_phrase: what users type; "" without one. prediction_type: "epsilon" or "v_prediction".
    is_v2: whether the base model has Stable Diffusion 2's text encoder.
    """

    title: str
    trigger_phrase: str
    prediction_type: str
    is_v2: bool

    @property
    def architecture(self) -> str:
        """The base model's architecture as modelspec names it."""
        return "stable-diffusion-v2" if self.is_v2 else "stable-diffusion-v1"

    def modelspec(self, kind: str) -> dict[str, str]:
        """Return the modelspec.* entries; kind is "lora" or "textual-inversion"."""
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{self.architecture}/{kind}",
            "modelspec.title": self.title,
            "modelspec.trigger_phrase": self.trigger_phrase,
            "modelspec.prediction_type": "v" if self.prediction_type == "v_prediction" else "epsilon",
        }


def write_kohya(adapter: BranchAdapter, facts: FileFacts, dtype: torch.dtype) -> bytes:
    """Return one branch's adapter as a kohya file: alpha is `ALPHA` everywhere, the true scale is in `lora_up`."""
    tensors: dict[str, torch.Tensor] = {}
    for network, layers in adapter.networks.items():
        for layer, factors in layers.items():
            name = kohya_name(network, layer)
            tensors[f"{name}.lora_down.weight"] = factors.down.to(dtype)
            tensors[f"{name}.lora_up.weight"] = factors.up_for_scale(ALPHA / factors.rank).to(dtype)
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA, dtype=dtype)
    return write_tensors(tensors, _metadata(adapter, facts, tensors))


def _metadata(adapter: BranchAdapter, facts: FileFacts, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    ranks = [factors.rank for layers in adapter.networks.values() for factors in layers.values()]
    return {
        "ss_output_name": facts.title,
        "ss_base_model_version": "sd_v2" if facts.is_v2 else "sd_v1",
        "ss_v2": str(facts.is_v2),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(ALPHA),
        "sshs_model_hash": hashlib.sha256(tensor_bytes(write_tensors(tensors, {}))).hexdigest(),
        **facts.modelspec("lora"),
    }


def read_kohya(file: bytes, name: str, modules: Mapping[str, Sequence[str]]) -> BranchAdapter:
    """Return a kohya file's adapter, in float32.

    Args:
        file: its bytes.
        name: what to call it in an error.
        modules: network -> the names of the base model's modules.

    Raises:
        InputError: not a safetensors file, keys that no module explains (all are listed), or half a pair.
    """
    known, unknown = layers_by_name(modules, kohya=True), []
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(file, name).items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None or key.removesuffix(suffix) not in known:
            unknown.append(key)
        else:
            parts.setdefault(known[key.removesuffix(suffix)], {})[_SUFFIXES[suffix]] = tensor.float()
    refuse_unknown(unknown, name, "the kohya format")
    return build_adapter({at: _factors(part, name, at) for at, part in parts.items()}, name)


def _factors(part: Mapping[str, torch.Tensor], name: str, at: tuple[str, str]) -> LoRAFactors:
    check_pair(part, name, at)
    rank = part["down"].shape[0]
    return LoRAFactors(part["down"], part["up"], float(part["alpha"]) / rank if "alpha" in part else 1.0)


# ------------------------------------------------------------------------------------------------- for all readers


def refuse_unknown(keys: Sequence[str], name: str, form: str) -> None:
    """Raise an InputError that lists keys nobody can place."""
    if keys:
        raise InputError(
            f"expected {name} to hold {form} for layers of this base model; got {len(keys)} unknown keys: "
            f"{', '.join(sorted(keys))}; load it with the base model and the format it was made for"
        )


def check_pair(part: Mapping[str, torch.Tensor], name: str, at: tuple[str, str]) -> None:
    """Raise an InputError when a layer lacks one of its two factors, or when they do not belong together."""
    if not {"down", "up"} <= part.keys() or part["down"].shape[0] != part["up"].shape[1]:
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
