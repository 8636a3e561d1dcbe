"""Stable Diffusion XL (Podell et al. 2023): two text encoders, and a UNet that is told an image's size and crop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dreamartist_pipeline.backbones.families.backbone import ModelSource
from dreamartist_pipeline.backbones.families.clip_text import text_model
from dreamartist_pipeline.backbones.families.unet import TEXT_ENCODER, UNET, UNetBackbone
from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, weight_states
from dreamartist_pipeline.errors import InputError

TEXT_ENCODER_2 = "text_encoder_2"
_ZEROS_FOR_EMPTY_PROMPT = "force_zeros_for_empty_prompt"
XL_NAMES = FileNames(
    title="SDXL",
    kohya_prefixes={UNET: "lora_unet_", TEXT_ENCODER: "lora_te1_", TEXT_ENCODER_2: "lora_te2_"},
    outer_modules={TEXT_ENCODER: "text_model."},  # the second text encoder has this level in memory, too
    embedding_keys={TEXT_ENCODER: "clip_l", TEXT_ENCODER_2: "clip_g"},
    architecture="stable-diffusion-xl-v1-base",
    kohya_version="sdxl_base_v1-0",
    pipeline="StableDiffusionXLPipeline",
    comfyui_text_layer=-2,
    a1111_has_clip_skip=False,
    kohya_uses_original_names=True,
)


@dataclass(frozen=True)
class XLConditioning:
    """Conditioning of N prompts.

    Attributes:
        states: of both text encoders side by side, `[N, L, D₁ + D₂]`.
        pooled: projected state of the end token in the second one, `[N, P]`.
    """

    states: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> XLConditioning:
        """Return the rows with these indices."""
        return XLConditioning(self.states[rows], self.pooled[rows])


@dataclass(kw_only=True)
class StableDiffusionXL(UNetBackbone):
    """Stable Diffusion XL.

    The text states are those before the last layer, without the final norm, in both text encoders.
    """

    family: ClassVar = "stable-diffusion-xl"
    pipelines: ClassVar = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    network_classes: ClassVar = {
        UNET: UNet2DConditionModel,
        TEXT_ENCODER: CLIPTextModel,
        TEXT_ENCODER_2: CLIPTextModelWithProjection,
    }
    tokenizer_folders: ClassVar = {TEXT_ENCODER: "tokenizer", TEXT_ENCODER_2: "tokenizer_2"}
    num_unread_layers: ClassVar = 1

    zeros_for_empty_prompt: bool = True

    @classmethod
    def check_index(cls, index: Mapping[str, Any], name: str) -> None:
        """Check that model_index.json names every part, as that of the refiner does not.

        Raises:
            InputError: a part is null.
        """
        if index.get(TEXT_ENCODER, True) in (None, [None, None]):
            raise InputError(
                expected="an SDXL base model",
                got=f"{name} without text_encoder, an SDXL refiner",
                remedy="set base_model to the base model, such as hub:stabilityai/stable-diffusion-xl-base-1.0",
            )
        super().check_index(index, name)

    @classmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Self:
        """Load every part; see `UNetBackbone.load`."""
        model = super().load(source, device, dtype)
        return replace(model, zeros_for_empty_prompt=bool(source.parts.index().get(_ZEROS_FOR_EMPTY_PROMPT, True)))

    @property
    def file_names(self) -> FileNames:
        """The names of its parts in files."""
        return self.with_unet_names(XL_NAMES)

    def unread_modules(self, encoder: str, clip_skip: int) -> set[nn.Module]:
        """Return the modules of the first text encoder that are not read; the pooled state reads all of the second."""
        return set() if encoder == TEXT_ENCODER_2 else super().unread_modules(encoder, clip_skip)

    def encode(self, tokens: Mapping[str, PromptTokens], clip_skip: int) -> XLConditioning:
        """Return the conditioning; text states are weighted by `weight_states`, each text encoder's by itself.

        The pooled state is that of the first end token. (transformers takes the token with the highest id in models
        that have the wrong `eos_token_id` 2, as the published ones: with a trigger word, that would be one of its
        vectors.)
        """
        outputs = {
            encoder: text_model(self.networks[encoder])(part.ids, output_hidden_states=True)
            for encoder, part in tokens.items()
        }
        last, end = outputs[TEXT_ENCODER_2].last_hidden_state, self._is_end(TEXT_ENCODER_2, tokens)
        rows = torch.arange(len(last), device=last.device)
        pooled = self.networks[TEXT_ENCODER_2].text_projection(last[rows, end.int().argmax(dim=1)])
        weighted = [
            states if part.weights is None else weight_states(states, part.weights)
            for encoder, part in tokens.items()
            for states in [outputs[encoder].hidden_states[-2 - clip_skip]]
        ]
        states = torch.cat(weighted, dim=-1)
        if self.zeros_for_empty_prompt:
            empty = self._is_end(TEXT_ENCODER, tokens)[:, 1]  # after the start token
            states, pooled = states.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return XLConditioning(states, pooled)

    def _is_end(self, encoder: str, tokens: Mapping[str, PromptTokens]) -> torch.Tensor:
        is_end: torch.Tensor = tokens[encoder].ids == self.tokenizers[encoder].eos_token_id
        return is_end

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any, framing: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the UNet's prediction `[N, C, h, w]`."""
        if framing is None:
            height, width = (side * self.latent_scale for side in latents.shape[2:])
            framing = torch.tensor([[height, width, 0, 0, height, width]], device=latents.device)
        added = {"text_embeds": conditioning.pooled, "time_ids": framing.expand(len(latents), -1)}
        prediction: torch.Tensor = self.unet(
            latents, timesteps, conditioning.states, added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction

    @property
    def pipeline(self) -> StableDiffusionXLPipeline:
        """Diffusers' text-to-image pipeline without scheduler."""
        return StableDiffusionXLPipeline(
            vae=self.autoencoder,
            unet=self.unet,
            scheduler=None,
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            add_watermarker=False,
            text_encoder=self.networks[TEXT_ENCODER],
            text_encoder_2=self.networks[TEXT_ENCODER_2],
            tokenizer=self.tokenizers[TEXT_ENCODER],
            tokenizer_2=self.tokenizers[TEXT_ENCODER_2],
        )
