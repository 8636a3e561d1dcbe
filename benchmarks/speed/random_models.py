"""Base models of real size with random weights, so that speed and memory can be measured without a download."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreamartist_pipeline.embedded.model import build_tokenizer

_CORPUS = ("a photo of two birds on a green hill", "a painting of a red cat", "white background") * 2
_MAX_TOKENS = 77
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP_L = {  # text encoder of CLIP ViT-L/14
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
OPENCLIP_G = {  # text encoder of OpenCLIP ViT-bigG/14
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    "sample_size": 128,
}

# The same classes with few channels, for tests.
TINY_PX = 128  # 2 × 2 positions in the innermost block: with a single one, attention has no gradient
_TINY_TEXT = {
    "vocab_size": 1000,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
_TINY_UNET = {"attention_head_dim": 2, "norm_num_groups": 4, "sample_size": 16, "layers_per_block": 1}
_TINY_AUTOENCODER = {
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "sample_size": TINY_PX,
    "layers_per_block": 1,
}


def write_sd15(folder: Path, dtype: torch.dtype, tiny: bool = False) -> Path:
    """Write a Stable Diffusion 1.5 with random weights in diffusers' layout, and return its folder."""
    small = {**_TINY_UNET, "block_out_channels": (8, 8, 8, 8), "cross_attention_dim": 16} if tiny else {}
    makers = {
        "unet": lambda: _initialized(UNet2DConditionModel, {**SD15_UNET, **small}, dtype),
        "text_encoder": lambda: _text_encoder(CLIPTextModel, CLIP_L, folder / "tokenizer", dtype, tiny),
        "vae": lambda: _autoencoder({}, tiny),
    }
    return _write(folder, "StableDiffusionPipeline", ("tokenizer",), makers)


def write_sdxl(folder: Path, dtype: torch.dtype, tiny: bool = False) -> Path:
    """Write a Stable Diffusion XL with random weights in diffusers' layout, and return its folder."""
    small = {
        **_TINY_UNET,
        "block_out_channels": (8, 8, 8),
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    makers = {
        "unet": lambda: _initialized(UNet2DConditionModel, {**SDXL_UNET, **(small if tiny else {})}, dtype),
        "text_encoder": lambda: _text_encoder(CLIPTextModel, CLIP_L, folder / "tokenizer", dtype, tiny),
        "text_encoder_2": lambda: _text_encoder(
            CLIPTextModelWithProjection, OPENCLIP_G, folder / "tokenizer_2", dtype, tiny
        ),
        "vae": lambda: _autoencoder({"sample_size": 1024, "scaling_factor": 0.13025}, tiny),
    }
    return _write(folder, "StableDiffusionXLPipeline", ("tokenizer", "tokenizer_2"), makers)


WRITERS: dict[str, Callable[[Path, torch.dtype, bool], Path]] = {"sd15": write_sd15, "sdxl": write_sdxl}
"""Name of the model, also of its environment in conf/ -> what writes it."""


def write_model(name: str, folder: Path, dtype: torch.dtype, tiny: bool = False) -> Path:
    """Write a model of WRITERS with random weights, always the same ones, and return its folder.

    Args:
        name: of the model.
        folder: to write to.
        dtype: of the UNet and the text encoders; the autoencoder is float32.
        tiny: the same kinds of layers in a fraction of the size.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WRITERS[name](folder, dtype, tiny)


def _write(folder: Path, pipeline: str, tokenizers: Sequence[str], makers: Mapping[str, Callable[[], Any]]) -> Path:
    """Write tokenizers, scheduler, parts and model_index.json."""
    index = {"_class_name": pipeline, **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers}}
    for name in tokenizers:
        build_tokenizer(_CORPUS, folder / name, _MAX_TOKENS)
    for name, make in {**makers, "scheduler": lambda: DDIMScheduler(**_SCHEDULER)}.items():
        part = make()  # one after the other: the largest is the peak memory
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _text_encoder(
    kind: Any, config: Mapping[str, Any], tokenizer_folder: Path, dtype: torch.dtype, tiny: bool
) -> nn.Module:
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {**config, **(_TINY_TEXT if tiny else {}), "max_position_embeddings": _MAX_TOKENS}
    model: nn.Module = kind(CLIPTextConfig(**sizes, **special)).to(dtype)
    return model


def _autoencoder(changes: Mapping[str, Any], tiny: bool) -> nn.Module:
    return _initialized(AutoencoderKL, {**AUTOENCODER, **changes, **(_TINY_AUTOENCODER if tiny else {})}, torch.float32)


def _initialized(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Return a module whose layers are initialised in `dtype`, without a float32 copy."""
    with torch.device("meta"):
        module = kind(**config)
    module = nn.Module.to(module, dtype).to_empty(device="cpu")
    for layer in module.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return module
