"""Predictions of a concept, and of its LoRA files loaded by diffusers, on the same inputs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from dreamartist_pipeline.backbones.concepts import attach
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.prompts import PromptEncoder
from dreamartist_pipeline.core.branches import BRANCH_NAMES, repeat, split
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.prompt_tokens import PromptTokens
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import StrengthParams

_NUM_BRANCHES = len(BRANCH_NAMES)
_NOISE_LEVELS = ((0.2, 0.3), (0.7, 0.8))  # one row from each range


@dataclass(frozen=True)
class Probe:
    """Fixed inputs of a comparison.

    Attributes:
        latents: `[B, C, h, w]`.
        timesteps: `[B]`.
        tokens: `[B, L]`, of the base vocabulary.
        clip_skip: how many of the text encoders' last layers are left out.
    """

    latents: torch.Tensor = field(repr=False)
    timesteps: torch.Tensor
    tokens: PromptTokens = field(repr=False)
    clip_skip: int = 0


@dataclass(frozen=True)
class FilePrediction:
    """A LoRA file as diffusers loads it.

    Attributes:
        layers: the adapted layers, `<network>.<module>`.
        prediction: `[B, C, h, w]`.
    """

    layers: frozenset[str]
    prediction: torch.Tensor = field(repr=False)


def make_probe(backbone: Backbone, seed: int = 0, clip_skip: int = 0) -> Probe:
    """Return random inputs of a seed: small latents at a low and a high noise level, random tokens."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, channels = len(_NOISE_LEVELS), backbone.latent_channels
    side = max(2, backbone.image_px // backbone.latent_scale // 4)
    timesteps = [backbone.objective.sample_timesteps(limits, 1, generator) for limits in _NOISE_LEVELS]
    tokens = PromptEncoder(backbone).tokenize([""] * num_rows)
    smallest = min(backbone.networks[name].get_input_embeddings().num_embeddings for name in backbone.tokenizers)
    words = torch.randint(smallest, tokens.ids.shape, generator=generator).to(backbone.device)
    return Probe(
        latents=torch.randn(num_rows, channels, side, side, generator=generator).to(backbone.device),
        timesteps=torch.cat(timesteps).to(backbone.device),
        tokens=PromptTokens(words),
        clip_skip=clip_skip,
    )


@torch.no_grad()
def base_prediction(backbone: Backbone, probe: Probe) -> torch.Tensor:
    """Return the base model's prediction `[B, C, h, w]`."""
    conditioning = PromptEncoder(backbone, clip_skip=probe.clip_skip).encode(probe.tokens)
    return backbone.denoise(probe.latents, probe.timesteps, conditioning)


@torch.no_grad()
def concept_predictions(backbone: Backbone, concept: Concept, probe: Probe) -> dict[str, torch.Tensor]:
    """Return branch name -> the prediction `[B, C, h, w]` of the concept's branch.

    Raises:
        InputError: the concept was trained on a base model of another layout.
    """
    loaded = attach(backbone, concept, StrengthParams())
    rows = torch.arange(len(probe.tokens), device=backbone.device)
    conditioning = loaded.prompts.encode(probe.tokens[repeat(rows, _NUM_BRANCHES)])  # of 2·B rows
    latents, timesteps = repeat(probe.latents, _NUM_BRANCHES), repeat(probe.timesteps, _NUM_BRANCHES)
    with loaded.merged():
        predictions = split(loaded.backbone.denoise(latents, timesteps, conditioning), _NUM_BRANCHES)
    return dict(zip(BRANCH_NAMES, predictions, strict=True))


@torch.no_grad()
def file_prediction(backbone: Backbone, file: bytes, name: str, probe: Probe) -> FilePrediction:
    """Load a LoRA file with `load_lora_weights` and predict; `backbone` is not changed.

    Args:
        backbone: a base model with a diffusers pipeline.
        file: a kohya or peft file.
        name: the file's name in an error.
        probe: the inputs.

    Raises:
        InputError: diffusers rejects the file.
    """
    own = backbone.share_weights()
    pipeline = own.pipeline
    assert pipeline is not None  # see Args
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lora.safetensors").write_bytes(file)
        try:
            pipeline.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name="exported")
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                expected=f"diffusers to load {name}",
                got=f"{type(error).__name__}: {error}",
                remedy="remove its format from export.formats",
            ) from error
    layers = frozenset(
        f"{network}.{module_name}"
        for network, module in own.networks.items()
        for module_name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    )
    return FilePrediction(layers, base_prediction(own, probe))
