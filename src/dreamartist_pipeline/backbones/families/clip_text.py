"""CLIP text encoders: their states after a chosen layer, and the layers that this leaves out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dreamartist_pipeline.errors import InputError


def check_clip_skip(num_layers: int, clip_skip: int) -> None:
    """Confirm that a layer remains.

    Raises:
        InputError: as many layers are skipped as there are, or more.
    """
    if clip_skip >= num_layers:
        raise InputError(
            expected=f"clip_skip below the text encoder's {num_layers} layers",
            got=f"{clip_skip}",
            remedy="lower it (0: none)",
        )


def text_states(encoder: Any, token_ids: torch.Tensor, clip_skip: int) -> torch.Tensor:
    """Return `[N, L, D]` after the final norm: of the last layer, or of an earlier one by clip_skip.

    The final norm follows an earlier layer too, as in diffusers' `StableDiffusionPipeline.encode_prompt`.
    """
    if not clip_skip:
        states: torch.Tensor = encoder(token_ids)[0]
        return states
    layers = encoder(token_ids, output_hidden_states=True).hidden_states
    normed: torch.Tensor = _text_model(encoder).final_layer_norm(layers[-(clip_skip + 1)])
    return normed


def skipped_modules(encoder: nn.Module, clip_skip: int) -> set[nn.Module]:
    """Return what clip_skip leaves out: no gradient would ever reach an adapter there."""
    blocks = _text_model(encoder).encoder.layers
    return {module for block in blocks[len(blocks) - clip_skip :] for module in block.modules()}


def _text_model(encoder: nn.Module) -> Any:
    return getattr(encoder, "text_model", encoder)  # transformers 5 has no module between
