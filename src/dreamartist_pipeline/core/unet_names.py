"""Names of a UNet's layers in the original code of Stable Diffusion, such as `input_blocks.4.1.proj_in`."""

from __future__ import annotations

import re
from collections.abc import Collection

_UNET_BLOCK = re.compile(
    r"(?P<side>down|mid|up)_blocks?(\.(?P<level>\d+))?\.(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"\.(?P<index>\d+)\.(?P<inner>.+)"
)
_ORIGINAL_NAMES = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_ORIGINAL_INNER_NAMES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_unet_names(layers: Collection[str], layers_per_block: int) -> dict[str, str]:
    """Return layer of a UNet -> its name in the original code of Stable Diffusion, for the layers that have one.

    Args:
        layers: names of modules in diffusers.
        layers_per_block: residual blocks per level on the way down; there is one more on the way up.
    """
    attends = {int(match[1]) for layer in layers if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", layer))}
    in_blocks = {layer: match for layer in layers if (match := _UNET_BLOCK.fullmatch(layer))}
    names = {layer: _name_in_block(match, layers_per_block + 1, attends) for layer, match in in_blocks.items()}
    return names | {layer: name for layer, name in _ORIGINAL_NAMES.items() if layer in layers}


def _name_in_block(match: re.Match[str], per_level: int, attends: Collection[int]) -> str:
    """Return the original name of a layer.

    Args:
        match: of `_UNET_BLOCK`.
        per_level: number of original blocks per level.
        attends: levels with attention on the way up.
    """
    side, level, kind, index = match["side"], int(match["level"] or 0), match["kind"], int(match["index"])
    inner = _ORIGINAL_INNER_NAMES.get(match["inner"], match["inner"])
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (level + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{per_level * (level + 1) - 1}.{2 if level in attends else 1}.conv"
    block = per_level * level + index
    name = f"input_blocks.{block + 1}" if side == "down" else f"output_blocks.{block}"
    return f"{name}.{1 if kind == 'attentions' else 0}.{inner}"
