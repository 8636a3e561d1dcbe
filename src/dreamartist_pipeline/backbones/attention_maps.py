"""Where a word acts in a drawn picture: maps of the UNet's cross-attention, per branch.

As in DAAM (Tang et al. 2023) and prompt-to-prompt (Hertz et al. 2022): attention probabilities, averaged over heads,
layers of two resolutions, and timesteps. Deviations from DAAM: the map of a word of several tokens or vectors is the
sum of theirs, the share of a pixel's attention that the word gets, in place of their mean; layers and timesteps are
averaged in place of summed; and maps are scaled linearly, because bicubic interpolation gives negative values.

The probabilities are computed from the queries and keys that the layers compute in any case, so that a picture is the
same with and without its maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch import nn

from dreamartist_pipeline.backbones.concepts import LoadedConcept, generate
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.unet import UNET
from dreamartist_pipeline.backbones.prompts import PromptEncoder
from dreamartist_pipeline.core.branches import BRANCH_NAMES, POSITIVE, split
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import SamplerParams

SCALES = (2, 4)
"""Latents per side of a query in the layers that are averaged: for 64 × 64 latents, 32 × 32 and 16 × 16 queries."""

BranchWords = Mapping[str, Sequence[str]]
"""positive or negative -> words of that branch's prompts."""

_Places = Mapping[tuple[str, str], Sequence[int]]
"""(branch, word) -> its positions in the text states of one picture."""


@dataclass(frozen=True)
class MappedPicture:
    """A picture with maps of words.

    Attributes:
        image: the same as without maps.
        maps: branch -> word -> float32 `[H, W]`, at the size of the picture, on the CPU: the mean share of a pixel's
            attention that the word gets, 0 to 1.
    """

    image: Image.Image
    maps: Mapping[str, Mapping[str, torch.Tensor]] = field(repr=False)

    def share(self, branch: str) -> torch.Tensor:
        """Return the share of a pixel's attention that all words of a branch get together, `[H, W]`."""
        return torch.stack(list(self.maps[branch].values())).sum(dim=0)


def draw_with_maps(
    backbone: Backbone,
    loaded: LoadedConcept,
    prompts: Sequence[str],
    negative_prompt: str,
    seeds: Sequence[int],
    sampler: SamplerParams,
    words: BranchWords,
    *,
    size_px: tuple[int, int] | None = None,
    scales: Sequence[int] = SCALES,
) -> list[MappedPicture]:
    """Generate one picture per prompt, as `concepts.generate`, with maps of words.

    Args:
        backbone: the base model that `loaded` was attached to.
        loaded: the concept, or the base model alone.
        prompts: one per picture, trigger words filled in; each has all words of the positive branch.
        negative_prompt: for all pictures; it has all words of the negative branch.
        seeds: one per picture.
        sampler: scheduler, steps, guidance scale and batch size.
        words: that get a map, trigger words or others.
        size_px: (width, height); None: the base model's size.
        scales: latents per side of a query; layers of other scales are left out.

    Raises:
        InputError: a prompt without one of its words, no layer of these scales, or as in `generate`.
    """
    width, height = size_px or (backbone.image_px, backbone.image_px)
    latent_size = (height // backbone.latent_scale, width // backbone.latent_scale)
    places = [_places(loaded.prompts, prompt, negative_prompt, words) for prompt in prompts]
    drawn: list[MappedPicture] = []
    for start in range(0, len(prompts), sampler.batch_size):
        rows = slice(start, start + sampler.batch_size)
        batch = (prompts[rows], negative_prompt, seeds[rows])
        recorder = _Recorder(places[rows], latent_size, scales)
        with recorder.listening_to(loaded.backbone.networks[UNET]):
            images = generate(backbone, loaded, *batch, sampler, size_px=(width, height))
        drawn += recorder.pictures(images)
    return drawn


def _places(encoder: PromptEncoder, prompt: str, negative_prompt: str, words: BranchWords) -> _Places:
    return {
        (branch, word): encoder.positions(prompt if branch == BRANCH_NAMES[POSITIVE] else negative_prompt, word)
        for branch, named in words.items()
        for word in named
    }


class _Recorder:
    """Sums the maps of one batch of pictures over layers and timesteps."""

    def __init__(self, places: Sequence[_Places], latent_size: tuple[int, int], scales: Sequence[int]) -> None:
        """Record nothing yet.

        Args:
            places: of each picture, with the same keys.
            latent_size: (height, width).
            scales: see `draw_with_maps`.
        """
        self._places, self._latent_size, self._scales = places, latent_size, scales
        height, width = latent_size
        grids = [(-(-height // scale), -(-width // scale)) for scale in scales]  # rounded up, as the UNet does
        self._grids = {rows * columns: (rows, columns) for rows, columns in grids}  # number of queries -> their grid
        self._sums: dict[tuple[str, str], torch.Tensor] = {}
        self._count = 0

    @contextmanager
    def listening_to(self, unet: nn.Module) -> Iterator[None]:
        """Record the cross-attention of a UNet within this context."""
        with ExitStack() as stack:
            for block in unet.modules():
                if isinstance(block, BasicTransformerBlock) and block.attn2 is not None:
                    stack.enter_context(_after_attention(block.attn2, self._add))
            yield

    def _add(self, attention: Any, query: torch.Tensor, key: torch.Tensor) -> None:
        """Add the maps of one layer at one timestep, at the size of the latents."""
        grid = self._grids.get(query.shape[1])
        if grid is None:
            return
        probabilities = attention_probabilities(query, key, attention.heads, attention.scale)
        by_branch = dict(zip(BRANCH_NAMES, split(probabilities, len(BRANCH_NAMES)), strict=True))  # [B, N, L] each
        for branch, word in self._places[0]:
            rows = zip(by_branch[branch], self._places, strict=True)
            shares = torch.stack([row[:, list(places[branch, word])].sum(dim=1) for row, places in rows])  # [B, N]
            maps = shares.unflatten(1, grid)[:, None]  # [B, 1, h, w]
            scaled = F.interpolate(maps, self._latent_size, mode="bilinear", align_corners=False)
            self._sums[branch, word] = self._sums.get((branch, word), 0) + scaled
        self._count += 1

    def pictures(self, images: Sequence[Image.Image]) -> list[MappedPicture]:
        """Return the pictures of the batch with their maps.

        Raises:
            InputError: no layer was recorded.
        """
        if not self._count:
            raise InputError(
                expected=f"cross-attention in the base model at scales among {', '.join(map(str, self._scales))}",
                got="none",
                remedy="name other scales, or draw larger pictures",
            )
        maps: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in images]
        for (branch, word), total in self._sums.items():
            size = (images[0].height, images[0].width)
            mean = F.interpolate(total / self._count, size, mode="bilinear", align_corners=False)[:, 0]
            for of_picture, one in zip(maps, mean.cpu(), strict=True):
                of_picture.setdefault(branch, {})[word] = one
        return [MappedPicture(image, of_picture) for image, of_picture in zip(images, maps, strict=True)]


def attention_probabilities(query: torch.Tensor, key: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """Return softmax(scale · Q · Kᵀ) over L, the mean over heads: float32 `[R, N, L]`.

    Args:
        query: `[R, N, heads · D]`.
        key: `[R, L, heads · D]`.
        num_heads: number of heads.
        scale: of the scores, usually 1 / √D.
    """
    queries, keys = (part.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key))
    probabilities: torch.Tensor = (scale * queries @ keys.transpose(-1, -2)).softmax(dim=-1)  # [R, heads, N, L]
    return probabilities.mean(dim=1)


@contextmanager
def _after_attention(attention: Any, record: Callable[[Any, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call `record` with an attention layer, its queries and its keys after each of its forward passes."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda _, inputs, output: seen.update({name: output})

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        record(module, seen.pop("query"), seen.pop("key"))

    hooks = [
        attention.to_q.register_forward_hook(keep("query")),
        attention.to_k.register_forward_hook(keep("key")),
        attention.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
