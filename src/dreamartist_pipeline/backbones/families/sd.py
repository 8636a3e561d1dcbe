"""Stable Diffusion 1.x and 2.x: a UNet, a CLIP text encoder and a DDPM noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from dreamartist_pipeline.backbones.families.clip_text import text_states
from dreamartist_pipeline.backbones.families.unet import TEXT_ENCODER, UNET, UNetBackbone
from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, weight_states

V1_NAMES = FileNames(
    title="Stable Diffusion 1.x",
    kohya_prefixes={UNET: "lora_unet_", TEXT_ENCODER: "lora_te_"},
    outer_modules={TEXT_ENCODER: "text_model."},
    embedding_keys={TEXT_ENCODER: "emb_params"},
    architecture="stable-diffusion-v1",
    kohya_version="sd_v1",
    pipeline="StableDiffusionPipeline",
    kohya_aliases={TEXT_ENCODER: ("lora_te1_",)},
)
V2_NAMES = replace(
    V1_NAMES,
    title="Stable Diffusion 2.x",
    architecture="stable-diffusion-v2",
    kohya_version="sd_v2",
    comfyui_text_layer=-2,  # other tools have the last layer, which the folders of diffusers leave out
    a1111_has_clip_skip=False,
)


@dataclass(kw_only=True)
class StableDiffusion(UNetBackbone):
    """Stable Diffusion 1.x or 2.x. Conditioning is the text states, a tensor `[N, L, D]`."""

    family: ClassVar = "stable-diffusion"
    pipelines: ClassVar = (
        *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        "LatentConsistencyModelPipeline",
    )
    network_classes: ClassVar = {UNET: UNet2DConditionModel, TEXT_ENCODER: CLIPTextModel}
    tokenizer_folders: ClassVar = {TEXT_ENCODER: "tokenizer"}

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The only text encoder."""
        return self.networks[TEXT_ENCODER]

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The text encoder's tokenizer."""
        return self.tokenizers[TEXT_ENCODER]

    @property
    def file_names(self) -> FileNames:
        """The names of version 1.x or 2.x, whose UNet projects linearly into its attention."""
        return self.with_unet_names(V2_NAMES if self.unet.config.use_linear_projection else V1_NAMES)

    def encode(self, tokens: Mapping[str, PromptTokens], clip_skip: int) -> torch.Tensor:
        """Return text states `[N, L, D]`, weighted by `weight_states` where the tokens have weights."""
        ids, weights = tokens[TEXT_ENCODER].ids, tokens[TEXT_ENCODER].weights
        with self.autocast():
            states = text_states(self.text_encoder, ids, clip_skip)
        return states if weights is None else weight_states(states, weights)

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any, framing: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the UNet's prediction `[N, C, h, w]`, which does not depend on the framing."""
        prediction: torch.Tensor = self.unet(latents, timesteps, conditioning, return_dict=False)[0]
        return prediction

    @property
    def pipeline(self) -> StableDiffusionPipeline:
        """Diffusers' text-to-image pipeline without scheduler and safety checker."""
        return StableDiffusionPipeline(
            vae=self.autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
