"""Stable Diffusion 1.x and 2.x: a UNet, a CLIP text encoder, and noise by a schedule of SNRs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreamartist_pipeline.backbones.families.backbone import Backbone, ModelSource, frozen
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
    parts: ClassVar = {
        UNET: "config.json",
        "vae": "config.json",
        TEXT_ENCODER: "config.json",
        "tokenizer": "tokenizer_config.json",
        "scheduler": "scheduler_config.json",
    }

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
        """Load every part; the autoencoder stays in float32.

        Raises:
            InputError: the UNet takes more than latents, or predicts neither ε nor v.
            OSError: a file that cannot be had or read.
        """
        place, options = source.location, {"local_files_only": source.local_files_only}
        _check_channels(place, options)
        tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer", **options)
        scheduler = DDPMScheduler.from_pretrained(place, subfolder="scheduler", **options)
        is_outline = device.type == "meta"
        parts = _outline(place, options) if is_outline else _weights(place, dtype, options)
        unet, autoencoder, text_encoder = (frozen(part, device) for part in parts)
        alphas_cumprod = scheduler.alphas_cumprod.float().to("cpu" if is_outline else device)
        return cls(
            name=source.name,
            fingerprint=source.fingerprint,
            networks={UNET: unet, TEXT_ENCODER: text_encoder},
            tokenizers={TEXT_ENCODER: tokenizer},
            autoencoder=autoencoder,
            objective=NoiseSchedule(alphas_cumprod, scheduler.config.prediction_type),
            scheduler_config=dict(scheduler.config),
            device=device,
            dtype=dtype,
            image_px=int(unet.config.sample_size) * 2 ** (len(autoencoder.config.block_out_channels) - 1),
        )

    @property
    def file_names(self) -> FileNames:
        """Names of the first or second version, which the text encoder's width tells apart."""
        names = V2_NAMES if self.text_encoder.config.hidden_size == _V2_TEXT_WIDTH else V1_NAMES
        return replace(names, layers_per_block=self.unet.config.layers_per_block)

    def encode(self, tokens: Mapping[str, PromptTokens], clip_skip: int) -> torch.Tensor:
        """Return text states `[N, L, D]`; weights of tokens, where there are any, act on them: see `weight_states`."""
        own = tokens[TEXT_ENCODER]
        with self.autocast():
            states = text_states(self.text_encoder, own.ids, clip_skip)
        return states if own.weights is None else weight_states(states, own.weights)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any) -> torch.Tensor:
        """Return the UNet's prediction `[N, C, h, w]`."""
        prediction: torch.Tensor = self.unet(latents, timesteps, conditioning, return_dict=False)[0]
        return prediction

    @property
    def pipeline(self) -> StableDiffusionPipeline:
        """Diffusers' text-to-image pipeline, without a scheduler and a safety checker."""
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


def _weights(place: str, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return UNet, autoencoder (float32) and text encoder."""
    return (
        UNet2DConditionModel.from_pretrained(place, subfolder=UNET, torch_dtype=dtype, **options),
        AutoencoderKL.from_pretrained(place, subfolder="vae", torch_dtype=torch.float32, **options),
        CLIPTextModel.from_pretrained(place, subfolder=TEXT_ENCODER, dtype=dtype, **options),
    )


def _outline(place: str, options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return the same in float32 on the meta device, by their configurations alone."""
    unet = UNet2DConditionModel.load_config(place, subfolder=UNET, **options)
    autoencoder = AutoencoderKL.load_config(place, subfolder="vae", **options)
    text_encoder = CLIPTextConfig.from_pretrained(place, subfolder=TEXT_ENCODER, **options)
    with torch.device("meta"):
        return (
            UNet2DConditionModel.from_config(unet),
            AutoencoderKL.from_config(autoencoder),
            CLIPTextModel(text_encoder),
        )


def _check_channels(place: str, options: Mapping[str, Any]) -> None:
    """Confirm, by the configurations alone, that the UNet takes noisy latents and nothing beside them.

    Raises:
        InputError: it has other input channels than latents have.
    """
    unet = UNet2DConditionModel.load_config(place, subfolder=UNET, **options)
    autoencoder = AutoencoderKL.load_config(place, subfolder="vae", **options)
    in_channels, latent_channels = unet.get("in_channels", 4), autoencoder.get("latent_channels", 4)  # their defaults
    if in_channels != latent_channels:
        raise InputError(
            expected=f"a text-to-image model, whose UNet takes the {latent_channels} channels of its latents",
            got=f"{in_channels} input channels in {place}, as inpainting models have for a mask and a picture",
            remedy=(
                "set base_model to the model that it was made from (generate redraws a part of a picture with "
                "init_mask)"
            ),
        )
