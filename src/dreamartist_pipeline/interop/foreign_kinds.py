"""Files that are given for a LoRA and are none that can be read here: what each is called, and what can be done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import NoReturn

import torch

from dreamartist_pipeline.core.file_kinds import Kind
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.decoding.torch_files import load_torch
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.pickled_weights import flat_names

_EXTRACT = "give a plain LoRA, or have LyCORIS extract one"
_AS_KOHYA = "save it in the kohya format: in OneTrainer, set the output format to Kohya"
_AS_WORD = "give it in import.words"
_AS_FOLDER = "give their folder as import.toolkit"
_NUMBERED = "a LoRA of cloneofsimo's lora, which numbers the layers in place of naming them"
_DIFFERENCE = "extract a LoRA of the difference, such as by kohya's extract_lora_from_models.py"
_EXTRACT_DIFFERENCE = f"merge it into its base model with the tool that made it, and {_DIFFERENCE}"
_MERGE = f"merge it into its base model with that tool (lora_add, mode upl-ckpt-v2), and {_DIFFERENCE}"
_CONVERT = (
    'convert it: python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load(open({source!r}, 'rb'), weights_only=True), {target!r})\""
)


# What no plain LoRA has in it, for whichever base model. Sources: LyCORIS, `weight_list` of its modules; OneTrainer,
# LoRASaverMixin; cloneofsimo/lora, `save_safeloras_with_embeds`.
_NOT_PLAIN = (
    Kind(r"^bundle_emb\.", "a LoRA with bundled embeddings", "extract them, and give LoRA and embeddings separately"),
    Kind(r"\.dora_scale$|\.lora_magnitude_vector", "a DoRA", _EXTRACT_DIFFERENCE),
    Kind(r"\.lokr_", "a LoKr", _EXTRACT),
    Kind(r"\.hada_", "a LoHa", _EXTRACT),
    Kind(r"\.oft_", "an OFT", _EXTRACT),
    Kind(r"\.[ab][12]\.weight$|\.bm\.weight$", "a GLoRA", _EXTRACT),
    Kind(r"\.on_input$", "an (IA)³", _EXTRACT),
    Kind(r"\.lora_mid\.", "a LoCon with Tucker decomposition", _EXTRACT),
    Kind(
        r"\.[wb]_norm$", "a LyCORIS file with trained norm layers", "train it without train_norm, or give a plain LoRA"
    ),
    Kind(r"\.diff(_b)?$", "whole weight differences", _EXTRACT),
    Kind(r"^lora_controlnet$|^lllite_", "a Control LoRA or ControlNet-LLLite", "give a plain LoRA"),
    Kind(r"^lora(_ema)?:", "adapters of HCP-Diffusion", _AS_FOLDER),
    Kind(r"^(unet|text_encoder):\d+:(up|down)$", _NUMBERED, _MERGE),
    Kind(r"^(em[bp]_params(_out)?|clip_[lg](_out)?|string_to_param|<[^<>]+>)$", "an embedding", _AS_WORD),
    Kind(
        r"^base_model\.model\.",
        "a peft file without the network's name",
        "save it with diffusers' save_lora_weights",
    ),
    Kind(r"^(conv_in|time_embedding\.linear_1)\.weight$", "a whole UNet", "give a LoRA"),
    Kind(r"(^|:)(model\.diffusion_model|first_stage_model|cond_stage_model)\.", "a whole model", "give a LoRA"),
)

# Names of layers that this base model does not have. Sources: kohya's lora_flux.py and lora_sd3.py, diffusers'
# lora_conversion_utils.py, OneTrainer's `_save_comfy`.
_OTHER_MODELS = (
    Kind(r"(^|[._])(double|single)_(transformer_)?blocks[._]", "a LoRA for Flux"),
    Kind(r"(^|[._])joint_blocks[._]", "a LoRA for Stable Diffusion 3"),
    Kind(
        r"^(lora_)?transformer[._]|^lora_te3_|^(diffusion_model\.|lora_unet_)((transformer_)?blocks|layers)[._]",
        "a LoRA for a transformer, such as Stable Diffusion 3, PixArt or Qwen",
    ),
    Kind(
        r"^lora_te2_|^text_encoder_2\.|[._]transformer_blocks[._][1-9]|[._](label_emb|add_embedding)[._]|[._]clip_g[._]",
        "a LoRA for SDXL",
        base_models=("SDXL",),
    ),
    Kind(
        r"^lora_te_|(^|[._])(down_blocks[._](0[._]attentions|3)|up_blocks[._]3)[._]",
        "a LoRA for Stable Diffusion 1.x or 2.x",
        base_models=("Stable Diffusion 1.x", "Stable Diffusion 2.x"),
    ),
    Kind(
        r"^diffusion_model\.|^text_encoders\.",
        "a LoRA with the layer names of ComfyUI (diffusion_model.), as OneTrainer writes it, too",
        _AS_KOHYA,
    ),
    Kind(r"^lora_unet_(input|middle|output)_blocks?_", "a LoRA for SDXL", base_models=("SDXL",)),
    Kind(
        r"^(input_blocks|middle_block|output_blocks)\.",
        "a LoRA with the layer names of Stable Diffusion's own code",
        _AS_KOHYA,
    ),
)
_BY_TEXT_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


def check_plain(keys: Collection[str], name: str) -> None:
    """Confirm that keys are not those of another kind of adapter, of an embedding or of a whole model.

    Raises:
        InputError: they are; the message says of which.
    """
    _refuse(keys, name, _NOT_PLAIN)


def check_not_for_another_model(keys: Collection[str], name: str, base_model: str) -> None:
    """Refuse keys by the base model that they belong to; to be asked where this base model has no such layers.

    Args:
        keys: of the file.
        name: its name in an error.
        base_model: the title of this base model.

    Raises:
        InputError: the base model that they belong to is known.
    """
    _refuse(keys, name, [kind for kind in _OTHER_MODELS if base_model not in kind.base_models], base_model)


def _refuse(keys: Collection[str], name: str, kinds: Collection[Kind], base_model: str = "") -> None:
    for kind in kinds:
        if key := kind.key_in(keys):
            other = f"set base_model to one for {' or '.join(kind.base_models)}, or " if kind.base_models else ""
            advice = kind.advice or f"{other}give one for {base_model}"
            raise InputError(expected=f"a plain LoRA in {name}", got=f"{kind.holds} ({key}, …)", remedy=advice)


def advice_by_width(layers: Mapping[tuple[str, str], LoRAFactors]) -> str:
    """Return what to do with a LoRA that does not fit, by the width of the text states that its UNet takes."""
    cross_attention = ("attn2.to_k", "attn2.to_v")
    widths = {factors.down.shape[1] for (_, layer), factors in layers.items() if layer.endswith(cross_attention)}
    width = widths.pop() if len(widths) == 1 else 0
    made_for = f" ({_BY_TEXT_WIDTH[width]}, by its cross-attention of width {width})" if width in _BY_TEXT_WIDTH else ""
    return f"set base_model to the one it was made for{made_for}, or give another file"


def refuse_pickled(file: bytes, name: str, path: str) -> NoReturn:
    """Say what a file that torch pickled holds, which is opened without running code, and what can be done.

    Args:
        file: its bytes.
        name: its name in an error.
        path: where it is, for a command that converts it.

    Raises:
        InputError: always.
    """
    content = load_torch(file, name, "a LoRA")
    if isinstance(content, list):
        raise InputError(expected=f"a plain LoRA in {name}", got=f"{_NUMBERED} (a list)", remedy=_MERGE)
    remedy = "have the tool that made it save a LoRA as safetensors"
    if isinstance(content, Mapping):
        check_plain(flat_names(content).keys() | {str(key) for key in content}, name)
        if all(isinstance(value, torch.Tensor) for value in content.values()):
            target = PurePath(path).with_suffix(".safetensors")
            target = target.with_stem(f"{target.stem}-converted") if target == PurePath(path) else target
            remedy = _CONVERT.format(source=path, target=str(target))
    raise InputError(
        expected=f"a LoRA as safetensors in {name}",
        got=f"a {type(content).__name__} that torch pickled",
        remedy=remedy,
    )
