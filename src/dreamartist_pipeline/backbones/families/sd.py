"""Stable Diffusion 1.x and 2.x: a UNet, a CLIP text encoder and a DDPM noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from dreamartist_pipeline.backbones.families.backbone import Backbone, ModelSource
from dreamartist_pipeline.backbones.families.clip_text import text_states
from dreamartist_pipeline.core.diffusion import NoiseSchedule
from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, weight_states
from dreamartist_pipeline.errors import InputError

UNET, TEXT_ENCODER = "unet", "text_encoder"
_V2_TEXT_WIDTH = 1024
V1_NAMES = FileNames(
    kohya_prefixes={UNET: "lora_unet_", TEXT_ENCODER: "lora_te_"},
    outer_modules={TEXT_ENCODER: "text_model."},
    embedding_keys={TEXT_ENCODER: "emb_params"},
    architecture="stable-diffusion-v1",
    kohya_version="sd_v1",
    pipeline="StableDiffusionPipeline",
    kohya_aliases={TEXT_ENCODER: ("lora_te1_",)},
)
V2_NAMES = replace(V1_NAMES, architecture="stable-diffusion-v2", kohya_version="sd_v2")


@dataclass(kw_only=True)
class StableDiffusion(Backbone):
    """Stable Diffusion 1.x or 2.x. Conditioning is the text states, a tensor `[N, L, D]`."""

    family: ClassVar = "stable-diffusion"
    pipelines: ClassVar = (
        *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        "LatentConsistencyModelPipeline",
    )
    network_classes: ClassVar = {UNET: UNet2DConditionModel, TEXT_ENCODER: CLIPTextModel}
    tokenizer_folders: ClassVar = {TEXT_ENCODER: "tokenizer"}
    scheduler_class: ClassVar = DDPMScheduler

    objective: NoiseSchedule

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.networks[UNET]

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The only text encoder."""
        return self.networks[TEXT_ENCODER]

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The text encoder's tokenizer."""
        return self.tokenizers[TEXT_ENCODER]

    @classmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Self:
        """Load every part; a UNet with inputs beside the latents is refused before any weights are read."""
        unet = UNet2DConditionModel.load_config(**source.part(UNET))
        autoencoder = AutoencoderKL.load_config(**source.part("vae"))
        in_channels, latent_channels = (
            unet.get("in_channels", 4),
            autoencoder.get("latent_channels", 4),
        )  # their defaults
        if in_channels != latent_channels:
            raise InputError(
                expected=f"a text-to-image model, whose UNet has the {latent_channels} input channels of its latents",
                got=f"{in_channels} input channels in {source.location}, as in an inpainting model",
                remedy="set base_model to the text-to-image model it was made from; generate inpaints with init_mask",
            )
        return super().load(source, device, dtype)

    @classmethod
    def make_objective(cls, scheduler: Any, device: torch.device) -> NoiseSchedule:
        """Return the noise schedule of a DDPM scheduler, in float32.

        Raises:
            InputError: the model predicts neither ε nor v.
        """
        return NoiseSchedule(scheduler.alphas_cumprod.float().to(device), scheduler.config.prediction_type)

    @property
    def image_px(self) -> int:
        """The side of the images that the UNet was trained on."""
        return int(self.unet.config.sample_size) * self.latent_scale

    @property
    def file_names(self) -> FileNames:
        """The names of version 1.x or 2.x, by the text encoder's width."""
        names = V2_NAMES if self.text_encoder.config.hidden_size == _V2_TEXT_WIDTH else V1_NAMES
        return replace(names, layers_per_block=self.unet.config.layers_per_block)

    def encode(self, tokens: Mapping[str, PromptTokens], clip_skip: int) -> torch.Tensor:
        """Return text states `[N, L, D]`, weighted by `weight_states` where the tokens have weights."""
        ids, weights = tokens[TEXT_ENCODER].ids, tokens[TEXT_ENCODER].weights
        states = text_states(self.text_encoder, ids, clip_skip)
        return states if weights is None else weight_states(states, weights)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any) -> torch.Tensor:
        """Return the UNet's prediction `[N, C, h, w]`."""
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
