"""CLIP text encoders: text states with clip_skip, and the modules that it leaves out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dreamartist_pipeline.errors import InputError


def check_clip_skip(num_layers: int, clip_skip: int) -> None:
    """Check that clip_skip leaves at least one layer.

    Raises:
        InputError: it does not.
    """
    if clip_skip >= num_layers:
        raise InputError(
            expected=f"clip_skip below the text encoder's {num_layers} layers",
            got=f"{clip_skip}",
            remedy="lower it (0: none)",
        )


def text_states(encoder: Any, token_ids: torch.Tensor, clip_skip: int) -> torch.Tensor:
    """Return the states `[N, L, D]` of the last layer, or of an earlier one by clip_skip, after the final norm.

    diffusers' `StableDiffusionPipeline.encode_prompt` applies the final norm to an earlier layer, too.
    """
    if not clip_skip:
        states: torch.Tensor = encoder(token_ids)[0]
        return states
    layers = encoder(token_ids, output_hidden_states=True).hidden_states
    normed: torch.Tensor = text_model(encoder).final_layer_norm(layers[-(clip_skip + 1)])
    return normed


def last_modules(encoder: nn.Module, num_layers: int) -> set[nn.Module]:
    """Return the modules of the last layers of a text encoder."""
    blocks = text_model(encoder).encoder.layers
    return {module for block in blocks[len(blocks) - num_layers :] for module in block.modules()}


def text_model(encoder: nn.Module) -> Any:
    """Return the text encoder without its projection."""
    return getattr(encoder, "text_model", encoder)  # a CLIPTextModel has no such level in transformers 5
