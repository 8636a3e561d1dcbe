"""Write single files in the names of the original implementations, from folders in diffusers' layout.

The inverse of the conversions in `diffusers.loaders.single_file_utils`, whose tables are read backwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_UNET, _VAE, _EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(
    folder: Path,
    file: Path,
    *,
    dtype: torch.dtype = torch.float32,
    leave_out: tuple[str, ...] = (),
    more: Mapping[str, torch.Tensor] | None = None,
    ema: bool = False,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write the model in `folder` to a `.safetensors` or `.ckpt` file, and return it.

    Args:
        folder: in diffusers' layout.
        file: to write.
        dtype: of the tensors.
        leave_out: prefixes of names that are not written, as in pruned files.
        more: further tensors.
        ema: whether the UNet's weights are there a second time, under flattened names.
        metadata: of a safetensors file.
    """
    tensors = single_file_tensors(folder)
    if ema:
        averaged = {_EMA + "".join(name.split(".")[1:]): t + 1 for name, t in tensors.items() if name.startswith(_UNET)}
        tensors |= averaged
    tensors = {
        name: t.to(dtype).contiguous() for name, t in tensors.items() if not name.startswith(leave_out or ("?",))
    }
    tensors |= more or {}
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata)
    else:
        torch.save({"state_dict": tensors, "global_step": 1, "epoch": 0}, file)
    return file


def single_file_tensors(folder: Path, weights: Callable[[Path], Tensors] | None = None) -> Tensors:
    """Return the tensors of the model in `folder` by their names in a single file.

    Args:
        folder: in diffusers' layout.
        weights: gives the tensors of the folder of a part; None to read its file.
    """
    weights = weights or _weights
    index = json.loads((folder / "model_index.json").read_text())
    tensors = {_UNET + name: t for name, t in _unet(weights(folder / "unet"), _config(folder / "unet")).items()}
    tensors |= {_VAE + name: t for name, t in original_autoencoder(folder / "vae", weights).items()}
    first, width = weights(folder / "text_encoder"), _config(folder / "text_encoder")
    if "text_encoder_2" in index:
        tensors |= _clip(first, "conditioner.embedders.0.transformer.")
        tensors |= _open_clip(weights(folder / "text_encoder_2"), "conditioner.embedders.1.model.")
    elif width["hidden_act"] == "gelu":  # OpenCLIP
        tensors |= _open_clip(first, "cond_stage_model.model.")
    else:
        tensors |= _clip(first, "cond_stage_model.transformer.")
    return tensors


def original_autoencoder(folder: Path, weights: Callable[[Path], Tensors] | None = None) -> Tensors:
    """Return the tensors of an autoencoder by their names in the original implementation."""
    levels = len(_config(folder)["block_out_channels"])
    top = {new: old for new, old in DIFFUSERS_TO_LDM_MAPPING["vae"].items()}
    named = {}
    for name, tensor in (weights or _weights)(folder).items():
        old = top.get(name) or _autoencoder_name(name, levels)
        named[old] = tensor[..., None, None] if "attn_1" in old and tensor.dim() == 2 else tensor
    return named


def _autoencoder_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in _VAE_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name.replace("conv_shortcut", "nin_shortcut")


def _unet(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    per_block = config["layers_per_block"] + 1
    tables = DIFFUSERS_TO_LDM_MAPPING["unet"]
    top = tables["layers"] | (tables["addition_embed_type"] if config.get("addition_embed_type") else {})
    has_attention = [kind.startswith("CrossAttn") for kind in config["up_block_types"]]

    def place(match: re.Match[str]) -> str:
        side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            number = per_block * (block + 1) if kind == "downsamplers" else per_block * block + layer + 1
            inner = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
            return f"input_blocks.{number}.{inner}"
        number = per_block * block + (per_block - 1 if kind == "upsamplers" else layer)
        inner = {"resnets": "0", "attentions": "1", "upsamplers": "2" if has_attention[block] else "1"}[kind]
        return f"output_blocks.{number}.{inner}"

    def original(name: str) -> str:
        if name in top:
            return top[name]
        if ".resnets." in name:
            for new, old in _RESNET.items():
                name = name.replace(f".{new}.", f".{old}.")
        name = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", place, name)
        name = name.replace(".0.op.conv.", ".0.op.")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
        return name.replace("mid_block.attentions.0", "middle_block.1")

    return {original(name): tensor for name, tensor in tensors.items()}


def _clip(tensors: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def _open_clip(tensors: Tensors, prefix: str) -> Tensors:
    top, inner = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"], DIFFUSERS_TO_LDM_MAPPING["openclip"]["transformer"]
    named, joined = {}, {}
    for bare, tensor in tensors.items():
        name = bare if bare.startswith("text_projection") else f"text_model.{bare.removeprefix('text_model.')}"
        if name in top:
            named[prefix + top[name]] = tensor.T if name.startswith("text_projection") else tensor
            continue
        for new, old in inner.items():
            name = name.replace(new, old)
        if match := re.fullmatch(r"(.*attn)\.([qkv])_proj\.(weight|bias)", name):
            joined.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            named[f"{prefix}transformer.{name}"] = tensor
    return named | {f"{prefix}transformer.{name}": torch.cat([each[k] for k in "qkv"]) for name, each in joined.items()}


def _weights(folder: Path) -> Tensors:
    """Return the weights of a part, in full precision where there are two."""
    return load_file(min(folder.glob("*.safetensors"), key=lambda file: len(file.suffixes)))


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
