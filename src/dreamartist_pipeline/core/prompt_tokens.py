"""Tokenized prompts with attention weights, and the weighting of text states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SMALLEST_MEAN = 1e-4  # of text states, relative to their root mean square; smaller means are rounding errors


class Conditioning(Protocol):
    """The conditioning of N prompts. Its content is specific to the family of base models.

    It is a tensor (for Stable Diffusion, the text states), or a dataclass of tensors and None.
    """

    def __getitem__(self, rows: torch.Tensor, /) -> Conditioning:
        """Return the rows with these indices."""


def map_tensors(change: Callable[..., torch.Tensor], first: Any, *others: Any) -> Any:
    """Return conditioning whose tensors are those of `change`, called with the tensors of all arguments.

    Args:
        change: called once per tensor.
        first, others: conditionings of the same content.
    """
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return change(first, *others)
    names = [field.name for field in dataclasses.fields(first)]
    changed = {name: map_tensors(change, *(getattr(each, name) for each in (first, *others))) for name in names}
    return dataclasses.replace(first, **changed)


def detached_leaves(
    conditioning: Conditioning,
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Conditioning]:
    """Return a copy of conditioning that collects gradients instead of passing them on.

    Returns:
        (tensor, its copy) of all tensors with gradients, and the conditioning with the copies.
    """
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        leaves.append((tensor, tensor.detach().requires_grad_()))
        return leaves[-1][1]

    copied: Conditioning = map_tensors(copy, conditioning)
    return leaves, copied


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """Token ids with attention weights. The tokens of several text encoders are concatenated along L.

    Attributes:
        ids: `[..., L]`, int64.
        weights: `[..., L]`, float32; None if all weights are 1.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: torch.Tensor) -> PromptTokens:
        """Return the rows with these indices."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> PromptTokens:
        """Return a copy on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def branches_in_rows(self) -> PromptTokens:
        """Stack branches: `[P, nb, L]` becomes `[nb·P, L]`."""
        return self._map(lambda tensor: tensor.transpose(0, 1).flatten(0, 1))

    def split(self, lengths: Sequence[int]) -> list[PromptTokens]:
        """Undo `side_by_side`; `lengths` sum to L."""
        weights = [None] * len(lengths) if self.weights is None else self.weights.split(list(lengths), dim=-1)
        return [PromptTokens(*each) for each in zip(self.ids.split(list(lengths), dim=-1), weights, strict=True)]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PromptTokens:
        return PromptTokens(change(self.ids), None if self.weights is None else change(self.weights))


def concatenate(parts: Sequence[PromptTokens]) -> PromptTokens:
    """Concatenate prompts: `[P, ..., L]` and `[Q, ..., L]` become `[P + Q, ..., L]`."""
    return _joined(parts, torch.cat)


def by_branch(parts: Sequence[PromptTokens]) -> PromptTokens:
    """Stack the prompts of all branches, `[P, L]` each: `[P, nb, L]`."""
    return _joined(parts, lambda tensors: torch.stack(tensors, dim=1))


def side_by_side(parts: Sequence[PromptTokens]) -> PromptTokens:
    """Concatenate the tokens of the same prompts: `[..., L]` and `[..., M]` become `[..., L + M]`."""
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
    """Multiply text states by their weights and restore the mean of the prompt: `h·w · mean(h) / mean(h·w)`.

    The means are over all tokens and channels of a prompt, including start, end and padding (HCP-Diffusion,
    `TEEXHook.mult_attn`). Deviation: the mean is not restored if it is a rounding error (`SMALLEST_MEAN`) or if the
    weights change its sign, because the quotient would be noise or negate all states. Weights of 1 change no bit.

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
