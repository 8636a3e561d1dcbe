"""A new concept as input of the training loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn

from dreamartist_pipeline.backbones.base_model import decode_with_gradients
from dreamartist_pipeline.backbones.concepts import NewConcept
from dreamartist_pipeline.backbones.placement import on_device
from dreamartist_pipeline.core.parameter_groups import ParameterGroup
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens
from dreamartist_pipeline.core.training_step import TrainableModel
from dreamartist_pipeline.params import TrainingParams


def trainable_model(new: NewConcept, groups: tuple[ParameterGroup, ...]) -> TrainableModel:
    """Return a new concept as input of the training loop."""
    encoders = new.backbone.tokenizers
    return TrainableModel(
        denoise=new.backbone.denoise,
        encode=functools.partial(_encode_and_return, new) if has_constant_prompts(new) else new.prompts.encode,
        objective=new.backbone.objective,
        groups=groups,
        num_branches=new.num_branches,
        dtype=new.backbone.dtype,
        decode=lambda latents: decode_with_gradients(new.backbone, latents),
        latent_adapters=tuple(adapters for network, adapters in new.stacks.items() if network not in encoders),
        prompt_adapters=tuple(adapters for network, adapters in new.stacks.items() if network in encoders),
        has_constant_prompts=has_constant_prompts(new),
    )


def has_constant_prompts(new: NewConcept) -> bool:
    """Return whether neither words nor adapters of a text encoder are trained."""
    return not new.words and not new.stacks.keys() & new.backbone.tokenizers.keys()


def idle_modules(new: NewConcept, params: TrainingParams) -> list[nn.Module]:
    """Return the modules that the steps of a training do not use."""
    idle: list[nn.Module] = [] if params.loss.reconstruction_weight else [new.backbone.autoencoder]
    return [*idle, *text_encoders(new)] if has_constant_prompts(new) else idle


def text_encoders(new: NewConcept) -> Sequence[nn.Module]:
    """Return the text encoders."""
    return [new.backbone.networks[name] for name in new.backbone.tokenizers]


def _encode_and_return(new: NewConcept, tokens: PromptTokens) -> Conditioning:
    """Encode prompts with text encoders that are off the device otherwise."""
    with on_device(text_encoders(new), new.backbone.device):
        return new.prompts.encode(tokens)
