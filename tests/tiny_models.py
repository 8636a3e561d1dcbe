"""Tiny base models with random weights, in the folders, files and tensor names of the published ones.

Architectures differ from the published ones in widths, in the number of text layers and, for SDXL, in the number of
transformer layers of the lowest level (2 in place of 10). Images are 64 × 64 px, latents 8 × 8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreamartist_pipeline.embedded.model import build_tokenizer

_CORPUS = ("a red cat", "a blue dog", "a photo of a green bird", "background", "style", "fox", "the yellow house")
_MAX_TOKENS = 77
_LATENTS = 8  # per side
_V1_WIDTH, _V2_WIDTH, _L_WIDTH, _G_WIDTH = 16, 24, 16, 24
_POOLED_WIDTH, _SIZE_WIDTH = 24, 8  # of the projection of SDXL's second text encoder, of each of its six numbers
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def build_sd1(folder: Path, seed: int = 0) -> Path:
    """Write a Stable Diffusion 1.x that predicts ε to `folder`, and return it."""
    return _build_sd(folder, seed, _V1_WIDTH, "quick_gelu", "epsilon", {"attention_head_dim": 2})


def build_sd2(folder: Path, seed: int = 0) -> Path:
    """Write a Stable Diffusion 2.x that predicts v to `folder`, and return it."""
    linear = {"attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True}
    return _build_sd(folder, seed, _V2_WIDTH, "gelu", "v_prediction", linear)


def build_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write a Stable Diffusion XL that predicts ε to `folder`, and return it."""
    return _build_sdxl(folder, seed, "epsilon")


def build_sdxl_v(folder: Path, seed: int = 0) -> Path:
    """Write a Stable Diffusion XL that predicts v with zero terminal SNR to `folder`, and return it."""
    return _build_sdxl(folder, seed, "v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


BUILDERS: Mapping[str, Callable[..., Path]] = {
    "sd1": build_sd1,
    "sd2-v": build_sd2,
    "sdxl": build_sdxl,
    "sdxl-v": build_sdxl_v,
}
"""name -> (folder, seed) -> folder"""


# ------------------------------------------------------------------------------------------------- the two kinds


def _build_sd(
    folder: Path, seed: int, width: int, activation: str, prediction_type: str, attention: Mapping[str, Any]
) -> Path:
    tokenizer = _tokenizer(folder / "tokenizer", "!" if activation == "gelu" else "<|endoftext|>")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(0.18215),
            text_encoder=_text_encoder(CLIPTextModel, _text_config(width, activation, tokenizer)),
            tokenizer=tokenizer,
            unet=_unet(
                block_out_channels=(8, 8, 16, 16),
                down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
                up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
                cross_attention_dim=width,
                **attention,
            ),
            scheduler=PNDMScheduler(
                **_NOISE, prediction_type=prediction_type, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return _save(pipeline, folder)


def _build_sdxl(folder: Path, seed: int, prediction_type: str, **of_scheduler: Any) -> Path:
    tokenizer = _tokenizer(folder / "tokenizer", "<|endoftext|>")
    tokenizer_2 = _tokenizer(folder / "tokenizer_2", "!")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(0.13025),
            text_encoder=_text_encoder(CLIPTextModel, _text_config(_L_WIDTH, "quick_gelu", tokenizer)),
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection, _text_config(_G_WIDTH, "gelu", tokenizer_2)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_unet(
                block_out_channels=(8, 16, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 2),
                attention_head_dim=(2, 4, 4),
                cross_attention_dim=_L_WIDTH + _G_WIDTH,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=_SIZE_WIDTH,
                projection_class_embeddings_input_dim=_POOLED_WIDTH + 6 * _SIZE_WIDTH,
            ),
            scheduler=EulerDiscreteScheduler(
                **_NOISE,
                prediction_type=prediction_type,
                steps_offset=1,
                **{"timestep_spacing": "leading"} | of_scheduler,
            ),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
        return _save(pipeline, folder)


# ------------------------------------------------------------------------------------------------- parts


def _autoencoder(scaling_factor: float) -> AutoencoderKL:
    return _with_effect(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=2,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=8 * _LATENTS,
            scaling_factor=scaling_factor,
        )
    )


def _unet(**architecture: Any) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(sample_size=_LATENTS, layers_per_block=2, norm_num_groups=4, **architecture)
    return _with_effect(unet)


def _with_effect(module: Any) -> Any:
    """Return a new module whose biases and norms are random, too, so that none of its tensors can be mistaken."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
    return module


def _text_encoder(kind: type[Any], config: CLIPTextConfig) -> Any:
    encoder = _with_effect(kind(config))
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)  # the default drowns words in positions
    return encoder


def _text_config(width: int, activation: str, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=_MAX_TOKENS,
        hidden_act=activation,
        projection_dim=_POOLED_WIDTH,
        bos_token_id=0,  # these three are wrong in the published models, too
        eos_token_id=2,
        pad_token_id=1,
    )


def _tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    build_tokenizer(_CORPUS * 2, folder, _MAX_TOKENS)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": pad_token}, indent=1))
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _save(pipeline: Any, folder: Path) -> Path:
    """Save all parts but the tokenizers, with the published names of tensors."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if part is not None and not name.startswith("tokenizer"):
            part.save_pretrained(folder / name)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})  # transformers 5 leaves text_model out
    return folder
