"""Base models of real size with random weights, so that speed and memory can be measured without a download."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

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
SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TINY_PX = 128  # 2 x 2 positions in the innermost block: with a single one, attention has no gradient
_TINY = {  # the same classes with few channels, for tests
    "unet": {
        "block_out_channels": (8, 8, 8, 8),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "sample_size": 16,
        "layers_per_block": 1,
    },
    "text": {
        "vocab_size": 1000,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    },
    "vae": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": 128, "layers_per_block": 1},
}


def write_sd15(folder: Path, dtype: torch.dtype, tiny: bool = False) -> Path:
    """Write a Stable Diffusion 1.5 with random weights in diffusers' layout, and return its folder.

    The autoencoder is float32. `tiny` gives the same kinds of layers in a fraction of the size.
    """
    small = _TINY if tiny else {"unet": {}, "text": {}, "vae": {}}
    tokenizer = build_tokenizer(_CORPUS, folder / "tokenizer", _MAX_TOKENS)
    text = CLIPTextConfig(
        **{**SD15_TEXT, **small["text"]},
        max_position_embeddings=_MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: _initialized(UNet2DConditionModel, {**SD15_UNET, **small["unet"]}, dtype),
        "text_encoder": lambda: CLIPTextModel(text).to(dtype),
        "vae": lambda: _initialized(AutoencoderKL, {**AUTOENCODER, **small["vae"]}, torch.float32),
        "scheduler": lambda: DDIMScheduler(**_SCHEDULER),
    }
    index = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    for name, make in makers.items():  # one after the other: the largest is the peak memory
        part = make()
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


WRITERS: dict[str, Callable[[Path, torch.dtype, bool], Path]] = {"sd15": write_sd15}
"""Name of the model, also of its environment in conf/ -> what writes it."""


def write_model(name: str, folder: Path, dtype: torch.dtype, tiny: bool = False) -> Path:
    """Write a model of WRITERS with random weights, always the same ones, and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WRITERS[name](folder, dtype, tiny)


def _initialized(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Return a module whose layers are initialised in `dtype`, without a float32 copy."""
    with torch.device("meta"):
        module = kind(**config)
    nn.Module.to(module, dtype).to_empty(device="cpu")
    for layer in module.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return module
