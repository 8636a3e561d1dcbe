"""LoRA files of other tools: detection of the format, rejection of other adapter types, and shape checks."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from dreamartist_pipeline.core.concept import FORMAT
from dreamartist_pipeline.core.layout import FileNames, Shapes
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter
from dreamartist_pipeline.interop.kohya import read_kohya
from dreamartist_pipeline.interop.peft_files import read_peft
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, read_tensors

_SHOWN = 3  # layers named in an error
_READERS = {"kohya": read_kohya, "peft": read_peft}
_ENDINGS = {"kohya": (".lora_down.weight", ".lora_up.weight"), "peft": (".lora_A.weight", ".lora_B.weight")}
_EXTRACT = "give a plain LoRA, or have LyCORIS extract one"
_SD_ONLY = "give one for Stable Diffusion 1.x or 2.x"
_OTHER_KINDS = {  # pattern of a key -> what a file with it holds, and what to do
    r"^bundle_emb\.": ("a LoRA with bundled embeddings", "extract them, and give LoRA and embeddings separately"),
    r"^lora_te[12]_|^lora_unet_(input|output)_blocks_|^text_encoder_2\.": ("a LoRA for SDXL", _SD_ONLY),
    r"\.dora_scale$|\.lora_magnitude_vector": ("a DoRA", "give a plain LoRA"),
    r"\.lokr_": ("a LoKr", _EXTRACT),
    r"\.hada_": ("a LoHa", _EXTRACT),
    r"\.oft_": ("an OFT", _EXTRACT),
    r"\.lora_mid\.": ("a LoCon with Tucker decomposition", _EXTRACT),
    r"\.diff(_b)?$": ("whole weight differences", _EXTRACT),
    r"^lora(_ema)?:": ("adapters of HCP-Diffusion", "give their folder as import.toolkit"),
    r"^emb_params$|^clip_[lg]$": ("an embedding", "give it in import.words"),
    r"^base_model\.model\.": ("a peft file without the network's name", "save it with diffusers"),
    r"[._]lora\.down\.weight$": ("an old format of diffusers", "load and save it with a current version"),
    r"^model\.diffusion_model\.": ("a whole model", "give a LoRA"),
}


@dataclass(frozen=True)
class ForeignLoRA:
    """The content of a LoRA file.

    Attributes:
        form: "kohya" or "peft".
        adapter: its updates.
    """

    form: str
    adapter: BranchAdapter


def read_lora(file: bytes, name: str, shapes: Shapes, names: FileNames) -> ForeignLoRA:
    """Read a LoRA file of another tool, in float32.

    Args:
        file: its bytes, safetensors.
        name: its name in an error.
        shapes: of the base model's layers.
        names: their names in files.

    Raises:
        InputError: not a safetensors file, not a plain LoRA, unknown keys, or shapes of another base model.
    """
    form = _form(read_tensors(file, name).keys(), read_metadata(file), name)
    return ForeignLoRA(form, fitted(_READERS[form](file, name, shapes, names), name, shapes))


def _form(keys: Collection[str], metadata: Mapping[str, str], name: str) -> str:
    """Return the format by the keys.

    Raises:
        InputError: another kind of file, which the message names if it is known.
    """
    if metadata.get("format") == FORMAT:
        raise InputError(
            expected=f"a LoRA of another tool in {name}",
            got="a concept of this project",
            remedy="copy it to data/06_models/SUBJECT/concept.safetensors, or start from it with training.start_from",
        )
    for pattern, (holds, advice) in _OTHER_KINDS.items():
        if found := [key for key in sorted(keys) if re.search(pattern, key)]:
            raise InputError(expected=f"a plain LoRA in {name}", got=f"{holds} ({found[0]}, …)", remedy=advice)
    for form, endings in _ENDINGS.items():
        if any(key.endswith(endings) for key in keys):
            return form
    raise InputError(
        expected=f"a LoRA in kohya or peft format in {name}",
        got=", ".join(sorted(keys)[:_SHOWN]) or "no tensors",
        remedy="give another file",
    )


def fitted(adapter: BranchAdapter, name: str, shapes: Shapes) -> BranchAdapter:
    """Return the adapter with the factors reshaped for its layers: files have 1 × 1 kernels with or without axes.

    Raises:
        InputError: shapes of another base model, or non-finite values; the message names the layers.
    """
    reshaped, wrong = {}, []
    for (network, layer), factors in adapter.by_layer().items():
        weight = shapes[network][layer]
        down, up = (factors.rank, *weight[1:]), (weight[0], factors.rank, *[1] * (len(weight) - 2))
        if _is_reshape(factors.down, down) and _is_reshape(factors.up, up):
            reshaped[network, layer] = replace(factors, down=factors.down.reshape(down), up=factors.up.reshape(up))
        else:
            got = f"{tuple(factors.down.shape)} and {tuple(factors.up.shape)}"
            wrong.append(f"{network}.{layer} is {got} where {down} and {up} are expected")
    if wrong:
        raise InputError(
            expected=f"{name} to fit the layers of this base model",
            got=f"{len(wrong)} of {adapter.num_layers} layers with other shapes: {'; '.join(wrong[:_SHOWN])}",
            remedy="set base_model to the one it was made for, or give another file",
        )
    if infinite := [".".join(at) for at, factors in adapter.by_layer().items() if not _is_finite(factors)]:
        raise InputError(
            expected=f"finite values in {name}",
            got=f"{len(infinite)} of {adapter.num_layers} layers with others: {', '.join(infinite[:_SHOWN])}",
            remedy="make or download it again",
        )
    return BranchAdapter.of_layers(reshaped)


def _is_finite(factors: LoRAFactors) -> bool:
    tensors = [tensor for tensor in (factors.down, factors.up, factors.bias) if tensor is not None]
    return math.isfinite(factors.scale) and all(bool(tensor.isfinite().all()) for tensor in tensors)


def _is_reshape(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether shapes differ at most in trailing axes of length 1."""
    got, length = tuple(tensor.shape), max(tensor.dim(), len(shape))
    return got + (1,) * (length - len(got)) == shape + (1,) * (length - len(shape))
