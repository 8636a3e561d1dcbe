"""A base model in memory, whatever its family: the one interface that training, drawing, import and export know."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTokenizer

from dreamartist_pipeline.core.adapters import set_noise_levels
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.layout import BaseModelIdentity, FileNames
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens


@dataclass(frozen=True)
class ModelSource:
    """Where a family reads a base model's parts.

    Attributes:
        name: without a path.
        fingerprint: of its weights.
        location: a folder or a Hugging Face id, as `from_pretrained` takes it.
        local_files_only: whether the network is left alone.
    """

    name: str
    fingerprint: str
    location: str
    local_files_only: bool


@dataclass(kw_only=True)
class Backbone(ABC):
    """A base model in memory, frozen; adapters and words are put into `networks` in place. One subclass per family.

    Attributes:
        networks: what LoRA groups may name -> the module.
        tokenizers: text encoder, one of the networks -> its tokenizer. A trigger word has vectors of every encoder's
            width.
        objective: what it is trained for.
        scheduler_config: of its own diffusers scheduler.
        image_px: the side the model was made for.
        family: the name of the family, in concepts.
        pipelines: the diffusers pipelines whose model_index.json it reads.
        parts: folder of a part -> the file that describes it.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    parts: ClassVar[Mapping[str, str]]

    name: str
    fingerprint: str
    networks: dict[str, Any]
    tokenizers: dict[str, CLIPTokenizer]
    autoencoder: AutoencoderKL
    objective: Objective
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    image_px: int

    # ------------------------------------------------------------------------------------------- of every family

    @classmethod
    @abstractmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Self:
        """Load every part, frozen and in eval mode; on the meta device, without reading any weights.

        Raises:
            InputError: the model cannot be trained as a text-to-image model of this family.
            OSError: a file that cannot be had or read.
        """

    @property
    @abstractmethod
    def file_names(self) -> FileNames:
        """What the files of other tools call the networks."""

    @abstractmethod
    def encode(self, tokens: Mapping[str, PromptTokens], clip_skip: int) -> Conditioning:
        """Return what `predict` is told of N prompts, given the tokens `[N, L]` of every text encoder.

        Args:
            tokens: text encoder -> its tokens.
            clip_skip: how many of its last layers are left out.
        """

    @abstractmethod
    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any) -> torch.Tensor:
        """Return the prediction `[N, C, h, w]` for latents in `dtype`, timesteps `[N]` and what `encode` returned."""

    @property
    def pipeline(self) -> Any | None:
        """The diffusers pipeline over these modules, which loads LoRA files; None where there is none."""
        return None

    # ------------------------------------------------------------------------------------------- the same in all

    @property
    def layer_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Network -> layer -> the shape of its weight, of every Linear and Conv2d."""
        return {
            network: {
                name: tuple(layer.weight.shape)
                for name, layer in module.named_modules()
                if isinstance(layer, nn.Linear | nn.Conv2d)
            }
            for network, module in self.networks.items()
        }

    @property
    def word_widths(self) -> dict[str, int]:
        """Text encoder -> the width of a learned vector."""
        return {name: self.networks[name].get_input_embeddings().embedding_dim for name in self.tokenizers}

    @property
    def identity(self) -> BaseModelIdentity:
        """What a concept of this base model remembers of it."""
        return BaseModelIdentity(self.name, self.fingerprint, self.family, tuple(self.networks))

    @property
    def latent_channels(self) -> int:
        """C of the latents `[B, C, h, w]`."""
        return int(self.autoencoder.config.latent_channels)

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.autoencoder.config.block_out_channels) - 1))

    def autocast(self) -> torch.autocast:
        """Return the context in which the frozen half-precision layers and float32 adapters meet."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the prediction `[N, C, h, w]` for latents `[N, C, h, w]`, timesteps `[N]` and N prompts."""
        for network in self.networks.values():
            set_noise_levels(network, self.objective.noise_level(timesteps))
        with self.autocast():
            return self.predict(latents.to(self.dtype), timesteps, conditioning)

    def share_weights(self) -> Self:
        """Return a base model whose networks are other modules over the same tensors."""
        return dataclasses.replace(self, networks={name: _copy(module) for name, module in self.networks.items()})


def frozen(module: Any, device: torch.device) -> Any:
    """Return a module on a device, in eval mode, without gradients."""
    return module.to(device).eval().requires_grad_(False)


def _copy(module: nn.Module) -> nn.Module:
    """Copy the modules, but not the parameters and buffers they hold."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)
