"""Prompts as the text encoder reads them: token ids, and how much the states of each token count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

SMALLEST_MEAN = 1e-4  # of a prompt's text states, as a share of their root mean square; below, it is only rounding


class Conditioning(Protocol):
    """What a denoiser is told about N prompts. Only the family of base models that made it looks inside.

    Stable Diffusion's is the tensor of text states itself.
    """

    def __getitem__(self, rows: torch.Tensor, /) -> Conditioning:
        """Return the rows of these indices, one after the other."""


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """Token ids `[..., L]` (int64) with their attention weights `[..., L]` (float32); None: all weights are 1.

    The tokens of several text encoders stand side by side in L: see `side_by_side` and `split`.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: torch.Tensor) -> PromptTokens:
        """Return the rows of these indices."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> PromptTokens:
        """Return the same on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def branches_in_rows(self) -> PromptTokens:
        """Stack branches: `[P, nb, L]` becomes `[nb·P, L]`."""
        return self._map(lambda tensor: tensor.transpose(0, 1).flatten(0, 1))

    def split(self, lengths: Sequence[int]) -> list[PromptTokens]:
        """Take apart what `side_by_side` joined; `lengths` add up to L."""
        weights = [None] * len(lengths) if self.weights is None else self.weights.split(list(lengths), dim=-1)
        return [PromptTokens(*each) for each in zip(self.ids.split(list(lengths), dim=-1), weights, strict=True)]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PromptTokens:
        return PromptTokens(change(self.ids), None if self.weights is None else change(self.weights))


def concatenate(parts: Sequence[PromptTokens]) -> PromptTokens:
    """Lay prompts end to end: `[P, ..., L]` and `[Q, ..., L]` become `[P + Q, ..., L]`."""
    return _joined(parts, torch.cat)


def by_branch(parts: Sequence[PromptTokens]) -> PromptTokens:
    """Put the prompts of every branch, `[P, L]` each, beside each other: `[P, nb, L]`."""
    return _joined(parts, lambda tensors: torch.stack(tensors, dim=1))


def side_by_side(parts: Sequence[PromptTokens]) -> PromptTokens:
    """Put the tokens of the same prompts beside each other: `[..., L]` and `[..., M]` become `[..., L + M]`."""
    return _joined(parts, lambda tensors: torch.cat(tensors, dim=-1))


def _joined(parts: Sequence[PromptTokens], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> PromptTokens:
    ids = join([part.ids for part in parts])
    if all(part.weights is None for part in parts):
        return PromptTokens(ids)
    filled = [
        torch.ones_like(part.ids, dtype=torch.float32) if part.weights is None else part.weights for part in parts
    ]
    return PromptTokens(ids, join(filled))


def weight_states(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply each token's text state by its weight and bring the prompt's mean back: `h·w · mean(h) / mean(h·w)`.

    The means are over all tokens and channels of a prompt, start, end and padding included (HCP-Diffusion,
    `TEEXHook.mult_attn`). Deviation: a mean whose size is rounding (`SMALLEST_MEAN`), or whose sign the weights would
    turn, is not brought back, because the quotient would be noise, or turn every state around. A prompt whose weights
    are all 1 stays bit for bit the same.

    Args:
        states: `[N, L, D]`.
        weights: `[N, L]`.

    Returns:
        `[N, L, D]` in the dtype of `states`; computed in float32.
    """
    plain = states.float()
    weighted = plain * weights[..., None]  # [N, L, D]
    before, after = (tensor.mean(dim=(1, 2), keepdim=True) for tensor in (plain, weighted))  # [N, 1, 1]
    smallest = SMALLEST_MEAN * plain.square().mean(dim=(1, 2), keepdim=True).sqrt()
    usable = (before * after > 0) & (torch.minimum(before.abs(), after.abs()) > smallest)
    factor = torch.where(usable, before / torch.where(usable, after, 1.0), 1.0)
    return (weighted * factor).to(states.dtype)
