"""Does diffusers' own loader make of a LoRA file what the concept says? Predictions of both, on the same inputs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from dreamartist_pipeline.backbones.base_model import Backbone
from dreamartist_pipeline.backbones.concepts import attach, share_weights
from dreamartist_pipeline.backbones.prompts import PromptEncoder
from dreamartist_pipeline.core.branches import BRANCH_NAMES, repeat, split
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.core.prompt_tokens import PromptTokens
from dreamartist_pipeline.params import StrengthParams

_NUM_BRANCHES = len(BRANCH_NAMES)
_NUM_ROWS = 2


@dataclass(frozen=True)
class Probe:
    """Fixed inputs: latents `[B, C, h, w]`, timesteps `[B]`, token ids `[B, L]` of the base vocabulary.

    clip_skip: how many of the text encoder's last layers are left out.
    """

    latents: torch.Tensor = field(repr=False)
    timesteps: torch.Tensor
    token_ids: torch.Tensor = field(repr=False)
    clip_skip: int = 0


@dataclass(frozen=True)
class FilePrediction:
    """What diffusers made of a file. layers: `<network>.<module>` that got an adapter. prediction: `[B, C, h, w]`."""

    layers: frozenset[str]
    prediction: torch.Tensor = field(repr=False)


def make_probe(backbone: Backbone, seed: int = 0, clip_skip: int = 0) -> Probe:
    """Draw inputs from a seed: a small picture at an early and a late timestep, random words."""
    generator = torch.Generator().manual_seed(seed)
    config = backbone.unet.config
    side = 2 ** (len(config.block_out_channels) - 1) * 2  # two latents a side where the UNet is narrowest
    num_tokens = min(backbone.tokenizer.model_max_length, backbone.text_encoder.config.max_position_embeddings)
    vocabulary_size = backbone.text_encoder.get_input_embeddings().num_embeddings
    last = backbone.schedule.num_train_timesteps - 1
    return Probe(
        latents=torch.randn(_NUM_ROWS, config.in_channels, side, side, generator=generator).to(backbone.device),
        timesteps=torch.tensor([last // 4, last * 3 // 4], device=backbone.device),
        token_ids=torch.randint(vocabulary_size, (_NUM_ROWS, num_tokens), generator=generator).to(backbone.device),
        clip_skip=clip_skip,
    )


@torch.no_grad()
def base_prediction(backbone: Backbone, probe: Probe) -> torch.Tensor:
    """Return what the base model predicts, `[B, C, h, w]`."""
    hidden = PromptEncoder(backbone, clip_skip=probe.clip_skip).encode(PromptTokens(probe.token_ids))
    return backbone.denoise(probe.latents, probe.timesteps, hidden)


@torch.no_grad()
def concept_predictions(backbone: Backbone, concept: Concept, probe: Probe) -> dict[str, torch.Tensor]:
    """Return what each branch of the concept predicts, both for the same inputs: branch name -> `[B, C, h, w]`.

    Raises:
        InputError: the concept was trained on another base model.
    """
    loaded = attach(backbone, concept, StrengthParams())
    hidden = loaded.prompts.encode(PromptTokens(repeat(probe.token_ids, _NUM_BRANCHES)))  # [2·B, L, D]
    latents, timesteps = repeat(probe.latents, _NUM_BRANCHES), repeat(probe.timesteps, _NUM_BRANCHES)
    predictions = split(loaded.backbone.denoise(latents, timesteps, hidden), _NUM_BRANCHES)
    return dict(zip(BRANCH_NAMES, predictions, strict=True))


@torch.no_grad()
def file_prediction(backbone: Backbone, file: bytes, name: str, probe: Probe) -> FilePrediction:
    """Load a LoRA file with `StableDiffusionPipeline.load_lora_weights` and predict; `backbone` stays as it is.

    Args:
        backbone: the base model.
        file: a kohya or peft file.
        name: what to call it in an error.
        probe: the inputs.

    Raises:
        InputError: diffusers refuses the file.
    """
    own = share_weights(backbone)
    pipeline = StableDiffusionPipeline(
        vae=own.autoencoder,
        text_encoder=own.text_encoder,
        tokenizer=own.tokenizer,
        unet=own.unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lora.safetensors").write_bytes(file)
        try:
            pipeline.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name="exported")
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                f"expected diffusers to load {name}; got {type(error).__name__}: {error}; "
                "leave its format out of export.formats"
            ) from error
    layers = frozenset(
        f"{network}.{module_name}"
        for network, module in (("unet", own.unet), ("text_encoder", own.text_encoder))
        for module_name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    )
    return FilePrediction(layers, base_prediction(own, probe))
