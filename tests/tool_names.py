"""The names by which other tools look for the layers of the models in tiny_models, in files of the kohya format.

Facts of the tools' public sources, stated without their code or this project's: ComfyUI (comfy/lora.py,
comfy/utils.py), A1111 (extensions-builtin/Lora/networks.py) and kohya's sd-scripts (networks/lora.py).
"""

from __future__ import annotations

import re

_DEPTHS = {"sd1": (1, 1, 1, 0), "sd2-v": (1, 1, 1, 0), "sdxl": (0, 2, 2), "sdxl-v": (0, 2, 2)}
"""Transformer layers per level, 0 for a level without attention."""

_TEXT_LAYERS = 3
_RESIDUAL = {"in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj"}
_RESIDUAL |= {"skip_connection": "conv_shortcut"}
_TRANSFORMER = [f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")] + [
    "ff_net_0_proj",
    "ff_net_2",
]
_TEXT = [f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]


def original_unet(name: str) -> dict[str, str]:
    """Return name in Stable Diffusion's original code -> name in diffusers, both with '_' for '.'."""
    depths = _DEPTHS[name]
    found = {"input_blocks_0_0": "conv_in", "out_2": "conv_out"}
    for level, depth in enumerate(depths):
        for index in range(2):
            found |= _block(f"input_blocks_{3 * level + index + 1}", f"down_blocks_{level}", index, depth)
        if level < len(depths) - 1:
            found[f"input_blocks_{3 * level + 3}_0_op"] = f"down_blocks_{level}_downsamplers_0_conv"
    for level, depth in enumerate(reversed(depths)):
        for index in range(3):
            found |= _block(f"output_blocks_{3 * level + index}", f"up_blocks_{level}", index, depth)
        if level < len(depths) - 1:
            up = f"output_blocks_{3 * level + 2}_{2 if depth else 1}_conv"
            found[up] = f"up_blocks_{level}_upsamplers_0_conv"
    for index in range(2):
        found |= {
            f"middle_block_{2 * index}_{old}": f"mid_block_resnets_{index}_{new}" for old, new in _RESIDUAL.items()
        }
    return found | _attention("middle_block_1", "mid_block_attentions_0", max(depths))


def _block(block: str, side: str, index: int, depth: int) -> dict[str, str]:
    residual = {f"{block}_0_{old}": f"{side}_resnets_{index}_{new}" for old, new in _RESIDUAL.items()}
    return residual | (_attention(f"{block}_1", f"{side}_attentions_{index}", depth) if depth else {})


def _attention(old: str, new: str, depth: int) -> dict[str, str]:
    inner = [f"transformer_blocks_{i}_{part}" for i in range(depth) for part in _TRANSFORMER]
    return {f"{old}_{part}": f"{new}_{part}" for part in ("proj_in", "proj_out", *inner)}


def comfyui_names(name: str) -> set[str]:
    """Original and diffusers' names of the UNet; lora_te1_ is read for an only text encoder, too."""
    unet = original_unet(name)
    prefixes = ("lora_te1", "lora_te2") if name.startswith("sdxl") else ("lora_te", "lora_te1")
    return {f"lora_unet_{layer}" for layer in (*unet, *unet.values())} | _text_names(*prefixes)


def kohya_names(name: str) -> set[str]:
    """The modules of kohya's own UNets without conv_in and conv_out: SDXL's has the original names."""
    unet = original_unet(name)
    is_xl = name.startswith("sdxl")
    layers = {layer for layer in (unet if is_xl else unet.values()) if layer not in ("conv_in", "conv_out")}
    prefixes = ("lora_te1", "lora_te2") if is_xl else ("lora_te",)
    return {f"lora_unet_{layer}" for layer in layers} | _text_names(*prefixes)


def a1111_names(name: str) -> set[str]:
    """The names that A1111 converts to a module of the model."""
    is_xl, is_v2 = name.startswith("sdxl"), name == "sd2-v"
    modules = {f"diffusion_model_{layer}" for layer in original_unet(name)}
    hugging, open_clip = "transformer_text_model_encoder_layers_{}_{}", "model_transformer_resblocks_{}_{}"
    open_clip_parts = [*(f"attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_c_fc", "mlp_c_proj"]
    kinds = [(open_clip if is_v2 else hugging, "")] if not is_xl else [(hugging, "0_"), (open_clip, "1_")]
    for pattern, prefix in kinds:
        parts = open_clip_parts if pattern == open_clip else _TEXT
        modules |= {prefix + pattern.format(i, part) for i in range(_TEXT_LAYERS) for part in parts}
    return {each for each in comfyui_names(name) if _in_a1111(each, is_v2) in modules}


def _in_a1111(name: str, is_v2: bool) -> str:
    if match := re.fullmatch(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", name):
        if not (is_v2 or match[1]):
            return f"transformer_text_model_encoder_layers_{match[2]}_{match[3]}"
        part = match[3].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
        return f"{'1_' if match[1] else ''}model_transformer_resblocks_{match[2]}_{part}"
    if name.startswith("lora_te1_text_model"):
        return name.replace("lora_te1_text_model", "0_transformer_text_model")
    layer = name.removeprefix("lora_unet_")
    if layer in ("conv_in", "conv_out"):
        return f"diffusion_model_{'input_blocks_0_0' if layer == 'conv_in' else 'out_2'}"
    if match := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", layer):
        block = 3 * int(match[2]) + int(match[4]) + (match[1] == "down")
        side = "input" if match[1] == "down" else "output"
        return f"diffusion_model_{side}_blocks_{block}_{_inner(match[3], match[5])}"
    if match := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", layer):
        part = _inner(match[1], match[3])
        return f"diffusion_model_middle_block_{1 if part[0] == '1' else 2 * int(match[2])}_{part[2:]}"
    if match := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", layer):
        return f"diffusion_model_input_blocks_{3 * int(match[1]) + 3}_0_op"
    if match := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", layer):
        return f"diffusion_model_output_blocks_{3 * int(match[1]) + 2}_{2 if int(match[1]) else 1}_conv"
    return f"diffusion_model_{layer}"  # already in the original code's names


def _inner(kind: str, part: str) -> str:
    residual = {new: old for old, new in _RESIDUAL.items()}
    return f"1_{part}" if kind == "attentions" else f"0_{residual.get(part, part)}"


def _text_names(*prefixes: str) -> set[str]:
    layers = [f"text_model_encoder_layers_{i}_{part}" for i in range(_TEXT_LAYERS) for part in _TEXT]
    return {f"{prefix}_{layer}" for prefix in prefixes for layer in layers}
