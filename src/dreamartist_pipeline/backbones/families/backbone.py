"""A base model in memory, whatever its family: the one interface of training, drawing, import and export."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import nn
from transformers import CLIPTokenizer

from dreamartist_pipeline.core.adapters import AdapterStack
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.layout import BaseModelIdentity, FileNames
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is loaded from.

    Attributes:
        name: without a path.
        fingerprint: of its weights.
        location: a folder or a Hugging Face id, as `from_pretrained` takes it.
        local_files_only: whether the network must not be used.
    """

    name: str
    fingerprint: str
    location: str
    local_files_only: bool

    def part(self, folder: str) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` or `load_config` for one part."""
        return {
            "pretrained_model_name_or_path": self.location,
            "subfolder": folder,
            "local_files_only": self.local_files_only,
        }


@dataclass(kw_only=True)
class Backbone(ABC):
    """A frozen base model in memory; adapters and words are put into `networks` in place. One subclass per family.

    Attributes:
        family: the family's name in the metadata of concepts.
        pipelines: diffusers pipelines whose model_index.json it reads.
        network_classes: network, also its folder -> its class in diffusers or transformers.
        tokenizer_folders: text encoder, one of the networks -> the folder of its tokenizer.
        scheduler_class: the diffusers scheduler in the folder `scheduler`.
        networks: what LoRA groups may name -> the module.
        tokenizers: text encoder -> its tokenizer. A trigger word has vectors of every encoder's width.
        objective: the noising and the training target.
        scheduler_config: of the model's own scheduler.
        adapters: network -> the adapters in it; networks without adapters are omitted.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    network_classes: ClassVar[Mapping[str, Any]]
    tokenizer_folders: ClassVar[Mapping[str, str]]
    scheduler_class: ClassVar[Any]

    source: ModelSource
    networks: dict[str, Any]
    tokenizers: dict[str, CLIPTokenizer]
    autoencoder: AutoencoderKL
    objective: Objective
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    adapters: dict[str, AdapterStack] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------- of every family

    @classmethod
    @abstractmethod
    def make_objective(cls, scheduler: Any, device: torch.device) -> Objective:
        """Return the objective of a model with this scheduler.

        Raises:
            InputError: the model predicts something else.
        """

    @property
    @abstractmethod
    def image_px(self) -> int:
        """The side of the images that the model was trained on."""

    @property
    @abstractmethod
    def file_names(self) -> FileNames:
        """The networks' names in the files of other tools."""

    @abstractmethod
    def encode(self, tokens: Mapping[str, PromptTokens], clip_skip: int) -> Conditioning:
        """Return the conditioning of N prompts.

        Args:
            tokens: text encoder -> its tokens `[N, L]`.
            clip_skip: how many of the last layers of each text encoder are left out.
        """

    @abstractmethod
    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any) -> torch.Tensor:
        """Return the prediction `[N, C, h, w]` for latents in `dtype`, timesteps `[N]` and conditioning of `encode`."""

    @property
    def pipeline(self) -> Any | None:
        """The diffusers pipeline over these modules, which can load LoRA files, or None."""
        return None

    # ------------------------------------------------------------------------------------------- the same in all

    @classmethod
    def parts(cls) -> dict[str, str]:
        """Return folder -> the file that describes the part in it."""
        return {
            **dict.fromkeys((*cls.network_classes, "vae"), "config.json"),
            **dict.fromkeys(cls.tokenizer_folders.values(), "tokenizer_config.json"),
            "scheduler": "scheduler_config.json",
        }

    @classmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Self:
        """Load every part, frozen and in eval mode, the autoencoder in float32; on the meta device without weights.

        Raises:
            InputError: the model cannot be trained as a text-to-image model of this family.
            OSError: a file cannot be downloaded or read.
        """
        scheduler = cls.scheduler_class.from_pretrained(**source.part("scheduler"))
        return cls(
            source=source,
            objective=cls.make_objective(scheduler, torch.device("cpu") if device.type == "meta" else device),
            scheduler_config=dict(scheduler.config),
            networks={
                name: _load_module(kind, source.part(name), device, dtype) for name, kind in cls.network_classes.items()
            },
            tokenizers={
                encoder: CLIPTokenizer.from_pretrained(**source.part(folder))
                for encoder, folder in cls.tokenizer_folders.items()
            },
            autoencoder=_load_module(AutoencoderKL, source.part("vae"), device, torch.float32),
            device=device,
            dtype=dtype,
        )

    @property
    def name(self) -> str:
        """The base model's name, without a path."""
        return self.source.name

    @property
    def fingerprint(self) -> str:
        """The fingerprint of its weights."""
        return self.source.fingerprint

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
        """What the metadata of a concept hold about its base model."""
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
        """Return the autocast context for float32 adapters in half-precision layers."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the prediction `[N, C, h, w]` for latents `[N, C, h, w]`, timesteps `[N]` and conditioning."""
        for adapters in self.adapters.values():
            adapters.set_noise_levels(self.objective.noise_level(timesteps))
        with self.autocast():
            return self.predict(latents.to(self.dtype), timesteps, conditioning)

    def share_weights(self) -> Self:
        """Return a base model with other modules for its networks over the same tensors."""
        networks = {name: _copy(module) for name, module in self.networks.items()}
        return dataclasses.replace(self, networks=networks, adapters={})


def _load_module(kind: Any, part: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Load a module of diffusers or transformers, frozen and in eval mode; on the meta device by its config alone.

    On a CUDA GPU, convolutions get the memory format channels_last.
    """
    is_diffusers = issubclass(kind, ModelMixin)
    if device.type == "meta":
        config = kind.load_config(**part) if is_diffusers else kind.config_class.from_pretrained(**part)
        with device:
            module = kind.from_config(config) if is_diffusers else kind(config)
    else:
        module = kind.from_pretrained(**part, **{"torch_dtype" if is_diffusers else "dtype": dtype})
    module = module.to(device).eval().requires_grad_(False)
    # tensor cores read convolutions' inputs by position; on a CPU both formats take the same time
    return module.to(memory_format=torch.channels_last) if device.type == "cuda" else module


def _copy(module: nn.Module) -> nn.Module:
    """Copy the modules, but not their parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)
