"""A base model in memory, whatever its family: the one interface of training, drawing, import and export."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from dreamartist_pipeline.backbones.families.clip_text import check_clip_skip, last_modules
from dreamartist_pipeline.backbones.holding.configurations import check_index
from dreamartist_pipeline.backbones.holding.parts import ModelParts, make_part
from dreamartist_pipeline.core.adapters import AdapterStack
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.layout import BaseModelIdentity, FileNames
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.schedulers import ZERO_SNR


@dataclass(frozen=True)
class ModelSource:
    """What a base model is loaded from.

    Attributes:
        name: without a path.
        fingerprint: of its weights.
        parts: its configurations, tokenizers and weights.
    """

    name: str
    fingerprint: str
    parts: ModelParts


@dataclass(kw_only=True)
class Backbone(ABC):
    """A frozen base model in memory; adapters and words are put into `networks` in place. One subclass per family.

    Attributes:
        family: the family's name in the metadata of concepts.
        pipelines: diffusers pipelines whose model_index.json it reads.
        network_classes: network, also its folder -> its class in diffusers or transformers.
        tokenizer_folders: text encoder, one of the networks -> the folder of its tokenizer.
        scheduler_class: the diffusers scheduler in the folder `scheduler`.
        num_unread_layers: the last layers of every text encoder that the text states leave out even without clip_skip.
        networks: what LoRA groups may name -> the module.
        tokenizers: text encoder -> its tokenizer. A trigger word has vectors of every encoder's width.
        objective: the noising and the training target.
        scheduler_config: of the model's own scheduler.
        zeros_for_empty_prompt: whether the conditioning of a prompt without tokens is zeros.
        adapters: network -> the adapters in it; networks without adapters are omitted.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    network_classes: ClassVar[Mapping[str, Any]]
    tokenizer_folders: ClassVar[Mapping[str, str]]
    scheduler_class: ClassVar[Any]
    num_unread_layers: ClassVar[int] = 0

    source: ModelSource
    networks: dict[str, Any]
    tokenizers: dict[str, CLIPTokenizer]
    autoencoder: AutoencoderKL
    objective: Objective
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    zeros_for_empty_prompt: bool = False
    adapters: dict[str, AdapterStack] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------- of every family

    @classmethod
    @abstractmethod
    def make_objective(cls, scheduler: Any, device: torch.device) -> Objective:
        """Return the objective of a model with this scheduler.

        Raises:
            InputError: the model predicts something else.
        """

    @classmethod
    def check_index(cls, index: Mapping[str, Any], name: str) -> None:
        """Check that the model_index.json of one of `pipelines` has the parts of the family, of classes that it reads.

        Args:
            index: its content.
            name: the base model's name in an error.

        Raises:
            InputError: a part is null or of another class.
        """
        check_index(index, cls.part_classes(), name)

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
    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any, framing: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the prediction `[N, C, h, w]` for latents in `dtype`; see `denoise`."""

    def unread_modules(self, encoder: str, clip_skip: int) -> set[nn.Module]:
        """Return the modules of a text encoder that do not change the conditioning; adapters there get no gradient."""
        return last_modules(self.networks[encoder], self.num_unread_layers + clip_skip)

    @property
    def pipeline(self) -> Any | None:
        """The diffusers pipeline over these modules, which can load LoRA files, or None."""
        return None

    # ------------------------------------------------------------------------------------------- the same in all

    @classmethod
    def parts(cls) -> tuple[str, ...]:
        """Return the parts that are read, by their folders in diffusers' layout."""
        return (*cls.network_classes, "vae", *cls.tokenizer_folders.values(), "scheduler")

    @classmethod
    def part_classes(cls) -> dict[str, tuple[str, ...]]:
        """Return part -> the classes that a model_index.json may name for it; () for any scheduler of diffusers."""
        networks = {part: (kind.__name__,) for part, kind in cls.network_classes.items()}
        tokenizers = dict.fromkeys(cls.tokenizer_folders.values(), ("CLIPTokenizer", "CLIPTokenizerFast"))
        return {**networks, "vae": ("AutoencoderKL",), **tokenizers, "scheduler": ()}

    @classmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Self:
        """Load every part, frozen and in eval mode, the autoencoder in float32; on the meta device without weights.

        Raises:
            InputError: the model cannot be trained as a text-to-image model of this family.
            OSError: a file cannot be downloaded or read.
        """
        parts = source.parts
        scheduler = make_part(cls.scheduler_class.from_config, parts.config("scheduler"), f"scheduler of {parts.place}")
        tokenizers = {encoder: parts.tokenizer(folder) for encoder, folder in cls.tokenizer_folders.items()}
        model = cls(
            source=source,
            objective=cls.make_objective(scheduler, torch.device("cpu") if device.type == "meta" else device),
            scheduler_config=dict(scheduler.config),
            networks={name: parts.module(kind, name, device, dtype) for name, kind in cls.network_classes.items()},
            tokenizers=tokenizers,
            autoencoder=parts.module(AutoencoderKL, "vae", device, torch.float32),
            device=device,
            dtype=dtype,
        )
        model._check_tokens()
        return model

    def _check_tokens(self) -> None:
        """Check that every token has an embedding.

        Raises:
            InputError: one has none.
        """
        for encoder, tokenizer in self.tokenizers.items():
            rows, highest = (
                self.networks[encoder].get_input_embeddings().num_embeddings,
                max(tokenizer.get_vocab().values()),
            )
            if highest >= rows:
                raise InputError(
                    expected=f"an embedding in {encoder} for every token of {self.tokenizer_folders[encoder]}",
                    got=f"{rows} embeddings, and a token with the number {highest}, in {self.source.parts.place}",
                    remedy="download the model again: its tokenizer is that of another model",
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
    def zero_terminal_snr(self) -> bool:
        """Whether the noise schedule ends without signal, by the model's own scheduler or a concept's training."""
        return bool(self.scheduler_config.get(ZERO_SNR))

    @property
    def latent_channels(self) -> int:
        """C of the latents `[B, C, h, w]`."""
        return int(self.autoencoder.config.latent_channels)

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.autoencoder.config.block_out_channels) - 1))

    def check_clip_skip(self, clip_skip: int) -> None:
        """Check that clip_skip leaves at least one layer of every text encoder.

        Raises:
            InputError: it does not.
        """
        for encoder in self.tokenizers:
            check_clip_skip(self.networks[encoder].config.num_hidden_layers - self.num_unread_layers, clip_skip)

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        framing: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the prediction `[N, C, h, w]`.

        Args:
            latents: `[N, C, h, w]`.
            timesteps: `[N]`.
            conditioning: of N prompts.
            framing: `images.Framing.numbers` of the images, `[N, 6]`; None: whole images of the latents' size.
        """
        for adapters in self.adapters.values():
            adapters.set_noise_levels(self.objective.noise_level(timesteps))
        return self.predict(latents.to(self.dtype), timesteps, conditioning, framing)

    def checkpoint_gradients(self) -> None:
        """Let all networks compute activations again in the backward pass instead of keeping them."""
        for network in self.networks.values():
            checkpoint_gradients(network)

    def compile_denoiser(self, backend: str = "inductor") -> None:
        """Compile the networks other than text encoders, at the first call with each shape of inputs."""
        for name, network in self.networks.items():
            if name not in self.tokenizers:
                network.compile(backend=backend, dynamic=False)

    def share_weights(self) -> Self:
        """Return a base model with other modules for its networks over the same tensors."""
        networks = {name: _copy(module) for name, module in self.networks.items()}
        return dataclasses.replace(self, networks=networks, adapters={})


def checkpoint_gradients(network: nn.Module) -> None:
    """Turn on gradient checkpointing, by the switches of diffusers and transformers.

    Dropout masks are drawn before the forward pass, so random states are not kept. A layer of transformers checkpoints
    in training mode only; its modules stay in eval mode.
    """
    modules: Iterator[Any] = network.modules()
    for module in modules:
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, _recompute
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _copy(module: nn.Module) -> nn.Module:
    """Copy the modules, but not their parameters and buffers; the empty containers of torch, four in five, at once."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copies = {each: each.__new__(type(each)) for each in module.modules()}
    shared |= {id(each): made for each, made in copies.items()}
    for each, made in copies.items():
        for name, value in vars(each).items():
            is_empty = isinstance(value, dict) and not value
            if name != "_compiled_call_impl":  # a compiled copy is compiled anew, as after a deep copy
                vars(made)[name] = value.copy() if is_empty else copy.deepcopy(value, shared)
    return copies[module]
