"""A toy family of base models, unlike Stable Diffusion in every respect that a family may differ in.

Two text encoders of different width, pooled states, float timesteps, flow matching, and a transformer of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin, UniPCMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from transformers import CLIPTextModel

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.clip_text import text_states
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.prompt_tokens import PromptTokens

TRANSFORMER, ENCODERS = "transformer", ("text_encoder", "text_encoder_2")


class FlowMatching(Objective):
    """z_t = (1 − s) · z₀ + s · ε with the target ε − z₀, at noise levels s = t / 1000 for a float t."""

    prediction_type = "flow_prediction"

    def sample_timesteps(self, limits: tuple[float, float], num_rows: int, generator: torch.Generator) -> torch.Tensor:
        low, high = limits
        return 1000 * (low + (high - low) * torch.rand(num_rows, generator=generator))

    def noise_level(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps.float() / 1000

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.lerp(latents, noise, self.noise_level(timesteps).view(-1, 1, 1, 1))

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def predicted_latents(
        self, noisy_latents: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        return noisy_latents - self.noise_level(timesteps).view(-1, 1, 1, 1) * prediction

    def loss_weight(self, weighting: str, gamma: float, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(timesteps))


class Transformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A denoiser that adds text, pooled text and noise level to every latent."""

    @register_to_config
    def __init__(self, channels: int = 4, text_width: int = 96, pooled_width: int = 64) -> None:
        super().__init__()
        self.latents, self.text = nn.Linear(channels, 16), nn.Linear(text_width, 16)
        self.pooled, self.time = nn.Linear(pooled_width, 16), nn.Linear(1, 16)
        self.out = nn.Linear(16, channels)

    def forward(self, latents: torch.Tensor, level: torch.Tensor, text: TextStates) -> torch.Tensor:
        condition = self.text(text.hidden.mean(1)) + self.pooled(text.pooled) + self.time(level[:, None])  # [N, 16]
        states = torch.tanh(self.latents(latents.flatten(2).mT) + condition[:, None])  # [N, h·w, 16]
        return self.out(states).mT.reshape(latents.shape)


@dataclass(frozen=True)
class TextStates:
    """Conditioning: the states of both encoders side by side, `[N, L, 96]`, and the second one's last, `[N, 64]`."""

    hidden: torch.Tensor
    pooled: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> TextStates:
        return TextStates(self.hidden[rows], self.pooled[rows])


@dataclass(kw_only=True)
class Toy(Backbone):
    """The toy family."""

    family: ClassVar = "toy"
    pipelines: ClassVar = ("ToyPipeline",)
    network_classes: ClassVar = {TRANSFORMER: Transformer, **dict.fromkeys(ENCODERS, CLIPTextModel)}
    tokenizer_folders: ClassVar = dict.fromkeys(ENCODERS, "tokenizer")
    scheduler_class: ClassVar = UniPCMultistepScheduler
    image_px: ClassVar = 32
    file_names: ClassVar = FileNames(
        title="Toy",
        kohya_prefixes={TRANSFORMER: "lora_transformer_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
        outer_modules=dict.fromkeys(ENCODERS, "text_model."),
        embedding_keys={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        architecture="toy",
        kohya_version="toy_v1",
    )

    @classmethod
    def make_objective(cls, scheduler: Any, device: torch.device) -> FlowMatching:
        return FlowMatching()

    def encode(self, tokens: Mapping[str, PromptTokens], clip_skip: int) -> TextStates:
        first, second = (text_states(self.networks[name], tokens[name].ids, clip_skip) for name in ENCODERS)
        return TextStates(torch.cat([first, second], dim=-1), second[:, -1])

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: TextStates, framing: torch.Tensor | None
    ) -> torch.Tensor:
        prediction: torch.Tensor = self.networks[TRANSFORMER](latents, timesteps / 1000, conditioning)
        return prediction
