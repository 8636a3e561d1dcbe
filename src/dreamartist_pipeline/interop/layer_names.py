"""Layer names in the files of other tools, and which layers each tool finds.

This project uses the module names of diffusers. A kohya name has '_' for '.', which can only be reversed with a list of
all modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.errors import InputError

_TRANSFORMER = r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
_UNET_LAYER = re.compile(
    r"conv_in|conv_out|(time|add)_embedding\.linear_[12]"
    r"|(down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
    rf"(resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|attentions\.\d+\.(proj_in|proj_out|{_TRANSFORMER}))"
    r"|down_blocks\.\d+\.downsamplers\.0\.conv|up_blocks\.\d+\.upsamplers\.0\.conv"
)
_TEXT_LAYER = re.compile(r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


def layers_by_name(modules: Mapping[str, Collection[str]], names: FileNames, kohya: bool) -> dict[str, tuple[str, str]]:
    """Return name in files -> (network, layer) of all modules.

    Args:
        modules: network -> the names of its modules.
        names: their names in files.
        kohya: whether to use kohya's names or `<network>.<name>`.

    Raises:
        InputError: two modules have the same kohya name.
    """
    found: dict[str, tuple[str, str]] = {}
    for network, layers in modules.items():
        for layer in layers:
            name = names.kohya(network, layer) if kohya else f"{network}.{names.external(network, layer)}"
            if found.setdefault(name, (network, layer)) != (network, layer):
                raise InputError(
                    expected=f"one module for the name {name!r}",
                    got=f"{found[name][1]} and {layer}",
                    remedy="use the peft format, which keeps the dots",
                )
    return found


# ------------------------------------------------------------------------------------------------- known layers


def known_to_comfyui(network: str, layer: str) -> bool:
    """Return whether ComfyUI finds a layer by its kohya name (`comfy.lora`: `unet_to_diffusers`, `LORA_CLIP_MAP`)."""
    pattern = _UNET_LAYER if network == "unet" else _TEXT_LAYER
    return pattern.fullmatch(layer) is not None


def known_to_comfyui_as_peft(network: str, layer: str) -> bool:
    """Return whether ComfyUI finds a layer under its peft name.

    In a UNet's attention it expects the old name `attn1.processor.to_q` and silently ignores `attn1.to_q`.
    """
    return known_to_comfyui(network, layer) and not (network == "unet" and ".to_" in layer)


def known_to_a1111(network: str, layer: str, names: FileNames) -> bool:
    """Return whether A1111 and Forge find a layer under its kohya name (`convert_diffusers_name_to_compvis`).

    They number a UNet's blocks as in the original code of Stable Diffusion, assuming two residual blocks per level,
    unless the name is that of the original code already.
    """
    numbered = network != "unet" or names.kohya_uses_original_names or names.layers_per_block == 2
    return numbered and known_to_comfyui(network, layer)


def diffusers_loses_layers(form: str, text_layers: Sequence[str]) -> bool:
    """Return whether diffusers fails to load some layers of a text encoder from a file.

    `convert_state_dict_to_diffusers` guesses the format of a text encoder's keys: q, k and v of a kohya file are only
    found if there is an out_proj, and a peft file with MLP layers only is rejected. The other format always works.

    Args:
        form: "kohya" or "peft".
        text_layers: the adapted layers of the text encoder.
    """
    attention = [layer for layer in text_layers if ".self_attn." in layer]
    if form == "kohya":
        return bool(attention) and not any(layer.endswith(".out_proj") for layer in attention)
    return bool(text_layers) and not attention
