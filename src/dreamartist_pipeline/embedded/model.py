"""Architecture of the embedded base model: the networks and the tokenizer of Stable Diffusion, at CPU size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreamartist_pipeline.params import EmbeddedModelSize

_WORD_END = "</w>"  # marks the end of a word in CLIP's byte-pair tokens


def build_autoencoder(size: EmbeddedModelSize) -> AutoencoderKL:
    """Return an untrained autoencoder.

    It downsamples by 2 between its levels. Residual blocks start as the identity (their last convolution is zero),
    which trains faster at this size.
    """
    levels = len(size.autoencoder_channels)
    autoencoder = AutoencoderKL(
        latent_channels=size.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=size.autoencoder_channels,
        layers_per_block=1,
        norm_num_groups=size.autoencoder_norm_groups,
        sample_size=size.image_px,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    for module in autoencoder.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
    return autoencoder


def build_unet(size: EmbeddedModelSize) -> UNet2DConditionModel:
    """Return an untrained UNet with cross-attention at some levels and a zero-initialised output layer."""
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in size.unet_attention)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(size.unet_attention))
    unet = UNet2DConditionModel(
        sample_size=size.image_px // 2 ** (len(size.autoencoder_channels) - 1),
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        block_out_channels=size.unet_channels,
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=size.text_width,
        attention_head_dim=4,
        norm_num_groups=size.unet_norm_groups,
    )
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_text_encoder(size: EmbeddedModelSize, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(_text_config(size, tokenizer))


@torch.no_grad()
def load_with_new_vocabulary(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    weights: Mapping[str, torch.Tensor],
    known: CLIPTokenizer,
) -> None:
    """Load weights of a text encoder with another vocabulary, in place; embeddings of new tokens are drawn at random.

    Args:
        text_encoder: for the vocabulary of `tokenizer`.
        tokenizer: the new vocabulary.
        weights: state dict for the vocabulary of `known`.
        known: the vocabulary of the weights.
    """
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    vectors = weights[name]  # [vocabulary, width]
    rows = vectors.mean() + vectors.std() * torch.randn(len(tokenizer), vectors.shape[1])
    known_ids = known.get_vocab()
    for token, row in tokenizer.get_vocab().items():
        if token in known_ids:
            rows[row] = vectors[known_ids[token]]
    text_encoder.load_state_dict({**weights, name: rows})


def build_towers(size: EmbeddedModelSize, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained CLIP model: text and image tower, with projections to a shared space."""
    return CLIPModel(
        CLIPConfig(
            text_config=_text_config(size, tokenizer).to_dict(),
            vision_config={
                "hidden_size": size.vision_width,
                "intermediate_size": 4 * size.vision_width,
                "num_hidden_layers": size.vision_layers,
                "num_attention_heads": max(1, size.vision_width // 32),
                "image_size": size.image_px,
                "patch_size": size.vision_patch_px,
                "projection_dim": size.text_width,
            },
            projection_dim=size.text_width,
        )
    )


def _text_config(size: EmbeddedModelSize, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=3 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=max(1, size.text_width // 32),
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=size.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tokenizer(captions: Sequence[str], folder: Path, max_tokens: int) -> CLIPTokenizer:
    """Train a byte-pair vocabulary on captions, and write it to `folder` for CLIPTokenizer.

    As in CLIP, the alphabet has every byte, inside and at the end of a word, so that any text can be tokenised. Each
    word of the captions becomes one token. Training is deterministic.
    """
    model = _train_byte_pairs(captions)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = [*alphabet, *(letter + _WORD_END for letter in alphabet), *(pair.replace(" ", "") for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"model_max_length": max_tokens, "tokenizer_class": "CLIPTokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _train_byte_pairs(captions: Sequence[str]) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix=_WORD_END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=2, end_of_word_suffix=_WORD_END, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return dict(json.loads(tokenizer.to_str())["model"])
