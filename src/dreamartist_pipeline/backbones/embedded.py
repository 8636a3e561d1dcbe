"""The embedded base model's architecture: the four Stable Diffusion parts, at the size of a laptop."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreamartist_pipeline.params import EmbeddedModelSize


def build_autoencoder(size: EmbeddedModelSize) -> AutoencoderKL:
    """Return an untrained autoencoder, one downsampling fewer than it has levels.

    Each residual block starts as the identity (its last convolution is zero), which trains faster at this size.
    """
    levels = len(size.autoencoder_channels)
    autoencoder = AutoencoderKL(
        latent_channels=size.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=size.autoencoder_channels,
        layers_per_block=1,
        norm_num_groups=size.norm_groups,
        sample_size=size.image_px,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    for module in autoencoder.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
    return autoencoder


def build_unet(size: EmbeddedModelSize) -> UNet2DConditionModel:
    """Return an untrained UNet with cross-attention at every level and a zero output layer."""
    levels = len(size.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=size.image_px // 2 ** (len(size.autoencoder_channels) - 1),
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        block_out_channels=size.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=size.text_width,
        attention_head_dim=4,
        norm_num_groups=size.norm_groups,
    )
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_text_encoder(size: EmbeddedModelSize, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=3 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=size.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
