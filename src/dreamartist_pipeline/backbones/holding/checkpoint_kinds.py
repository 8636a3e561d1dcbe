"""What a single file is, by its keys: a base model that can be opened, another one, or no base model at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dreamartist_pipeline.core.file_kinds import Kind
from dreamartist_pipeline.errors import InputError

UNET_PREFIX, VAE_PREFIX, EMA_PREFIX = "model.diffusion_model.", "first_stage_model.", "model_ema."


@dataclass(frozen=True)
class CheckpointKind:
    """A kind of base model whose single files can be opened.

    Attributes:
        name: of its folder of configurations.
        text_encoders: text encoder -> prefix of its keys.
    """

    name: str
    text_encoders: Mapping[str, str]

    @property
    def prefixes(self) -> dict[str, str]:
        """Part -> prefix of its keys."""
        return {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **self.text_encoders}


SD1 = CheckpointKind("sd1", {"text_encoder": "cond_stage_model.transformer."})
SD2 = CheckpointKind("sd2", {"text_encoder": "cond_stage_model.model."})
SDXL = CheckpointKind(
    "sdxl",
    {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
)

_NOT_YET = "not yet: choose a model of Stable Diffusion 1.x, 2.x or XL"
_WHOLE = "set base_model to the whole model"
_OTHER_CODE = "download the model in another format: safetensors in half or full precision"

# In their order: the first one with a key in the file. Sources: diffusers' CHECKPOINT_KEY_NAMES and the conversion
# scripts of each model; LyCORIS and kohya's scripts for adapters.
_OTHER_KINDS = (
    Kind(r"^control_model\.|^controlnet_|^input_hint_block\.", "a ControlNet", _WHOLE),
    Kind(
        r"(^|[._])lora_(up|down|mid|A|B|unet|te\d?)([._]|$)|\.lora\.(up|down)\.|\.(hada|lokr|oft)_|\.dora_scale$",
        "a LoRA",
        "set base_model to the model that it was made for; `import` makes a concept of a LoRA (docs/import.md)",
    ),
    Kind(
        r"^(em[bp]_params(_out)?|clip_[lg](_out)?|string_to_param:.*|<[^<>]+>)$",
        "an embedding",
        "set base_model to the model that it was made for; `import` makes a concept of an embedding (docs/import.md)",
    ),
    Kind(r"motion_modules\.", "a motion module of AnimateDiff", _WHOLE),
    Kind(r"^ip_adapter[._]|^image_proj\.", "an IP-Adapter", _WHOLE),
    Kind(r"(^|\.)scaled_fp8$|\.scale_weight$|\.comfy_quant$|\.absmax$|bitsandbytes", "a quantized model", _OTHER_CODE),
    Kind(r"^conditioner\.embedders\.0\.model\.", "the SDXL refiner", "set base_model to an SDXL base model"),
    Kind(r"^conditioner\.embedders\.0\.open_clip\.", "Stable Video Diffusion", _NOT_YET),
    Kind(r"^edm_", "Playground v2.5 or CosXL", _NOT_YET),
    Kind(r"(^|\.)joint_blocks\.", "Stable Diffusion 3", _NOT_YET),
    Kind(r"(^|\.)single_stream_modulation\.", "Flux.2", _NOT_YET),
    Kind(r"(^|\.)distilled_guidance_layer\.", "Chroma", _NOT_YET),
    Kind(r"(^|\.)txt_in\.individual_token_refiner\.", "HunyuanVideo", _NOT_YET),
    Kind(r"(^|\.)text_embedding_padding$", "Hunyuan-DiT", _NOT_YET),
    Kind(r"(^|\.)double_blocks\.", "Flux", _NOT_YET),
    Kind(r"(^|\.)clip_txt_mapper\.|(^|\.)channelwise\.", "Stable Cascade", _NOT_YET),
    Kind(r"(^|\.)double_stream_blocks\.", "HiDream", _NOT_YET),
    Kind(r"(^|\.)transformer_blocks\.0\.img_mod\.", "Qwen-Image", _NOT_YET),
    Kind(r"(^|\.)layers\.0\.adaLN_modulation\.0\.", "Z-Image", _NOT_YET),
    Kind(r"(^|\.)cap_embedder\.", "Lumina", _NOT_YET),
    Kind(r"(^|\.)blocks\.0\.mlp\.depth_conv\.", "Sana", _NOT_YET),
    Kind(r"(^|\.)blocks\.0\.cross_attn\.kv_linear\.", "PixArt", _NOT_YET),
    Kind(r"(^|\.)head\.modulation$", "Wan", _NOT_YET),
    Kind(r"(^|\.)patchify_proj\.", "LTX-Video", _NOT_YET),
    Kind(r"(^|\.)blocks\.0\.attn\.qkv_x\.", "Mochi", _NOT_YET),
    Kind(r"(^|\.)double_layers\.", "AuraFlow", _NOT_YET),
    Kind(r"^net\.x_embedder\.", "Cosmos", _NOT_YET),
)
_SINGLE_PARTS = (
    Kind(
        r"^model\.diffusion_model\.",
        "a UNet without text encoders",
        "download the whole model, or give a folder in diffusers' layout",
    ),
    Kind(r"^model_ema\.", "EMA weights without a model", _WHOLE),
    Kind(
        r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.conv_in\.weight$",
        "an autoencoder",
        "set vae to it, and base_model to a whole model",
    ),
    Kind(
        r"^(conv_in|time_embedding\.linear_1)\.weight$",
        "the UNet of a folder in diffusers' layout",
        "set base_model to the folder that has model_index.json",
    ),
    Kind(r"(^|\.)(encoder\.layers|resblocks)\.0\.", "a text encoder", _WHOLE),
    Kind(r"^(conv_first|body\.0|model\.0|RRDB_trunk)\.", "an upscaler", _WHOLE),
)


def kind_of(keys: Collection[str], file: str) -> CheckpointKind:
    """Return the kind of a base model.

    Args:
        keys: of the tensors in its file.
        file: its path, for errors.

    Raises:
        InputError: it is another kind of file, or lacks its UNet.
    """
    _refuse(keys, file, _OTHER_KINDS)
    for kind in (SDXL, SD2, SD1):
        if any(key.startswith(prefix) for key in keys for prefix in list(kind.text_encoders.values())[-1:]):
            return kind
    _refuse(keys, file, _SINGLE_PARTS)
    raise InputError(
        expected=f"a base model at {file}",
        got=f"unknown keys: {', '.join(sorted(keys)[:3])}, …" if keys else "no tensors",
        remedy="set base_model to a single file of Stable Diffusion 1.x, 2.x or XL, or to a folder in diffusers' "
        "layout",
    )


def _refuse(keys: Collection[str], file: str, kinds: Collection[Kind]) -> None:
    for kind in kinds:
        if key := kind.key_in(keys):
            raise InputError(expected=f"a base model at {file}", got=f"{kind.holds} ({key}, …)", remedy=kind.advice)
