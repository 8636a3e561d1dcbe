"""The factors of many adapted layers, laid out and cast for their products at once.

A training step packs all factors before its first forward pass. Forward passes of the step, in micro-batches or
repeated by gradient checkpointing, then use the same tensors, and their gradients go back to the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dreamartist_pipeline.core.branch_products import ConvGeometry, arranged_down, original_down


@dataclass(frozen=True)
class PackedFactors:
    """The factors of one layer for `branch_products`.

    Attributes:
        down: `[nb, R, in]`, or for a convolution as `arranged_down` of each branch.
        up: `[nb, out, R]`, times alpha / rank and the branch's strength.
        bias: Σ scale · bias, `[nb, out]`, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class FactorLayout:
    """How the factors of one layer's updates are laid out; R is the largest total rank of a branch.

    Attributes:
        branches: for each branch of the stacked batch, the indices of its updates.
        ranks: of each update.
        num_ranks: R.
        width: in, or in · kh · kw.
        out: the number of outputs.
        geometry: of a convolution, or None.
        biases: indices of the updates with a bias.
        scale: alpha / rank · strength of each rank, `[nb, 1, R]`; None where all are 1.
        bias_scale: the same of each bias, 0 for a bias of another branch, `[nb, num_biases]`.
    """

    branches: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    num_ranks: int
    width: int
    out: int
    geometry: ConvGeometry | None
    biases: tuple[int, ...]
    scale: torch.Tensor | None
    bias_scale: torch.Tensor

    @property
    def num_values(self) -> tuple[int, int]:
        """The numbers of values of `PackedFactors.down` and `up`."""
        return len(self.branches) * self.num_ranks * self.width, len(self.branches) * self.num_ranks * self.out

    @property
    def is_plain(self) -> bool:
        """Whether each branch has one update of its own, all of one rank and without bias."""
        updates = [index for row in self.branches for index in row]
        one_each = all(len(row) == 1 for row in self.branches) and len(set(updates)) == len(self.branches)
        return one_each and set(self.ranks) == {self.num_ranks} and not self.biases

    def down_pieces(self, downs: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the values of `PackedFactors.down` in order, in flat pieces."""
        arranged = [down if self.geometry is None else arranged_down(down, self.geometry) for down in downs]
        for row in self.branches:
            for index in row:
                yield arranged[index].reshape(-1)
            if missing := self._missing(row):
                yield downs[0].new_zeros(missing * self.width)

    def up_pieces(self, ups: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the values of `PackedFactors.up` in order, in flat pieces, without their scale."""
        for row in self.branches:
            parts = [ups[index].flatten(1) for index in row]  # [out, rank] each
            if missing := self._missing(row):
                parts.append(ups[0].new_zeros(self.out, missing))
            yield (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).reshape(-1)

    def _missing(self, row: Sequence[int]) -> int:
        return self.num_ranks - sum(self.ranks[index] for index in row)

    def shaped(self, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the flat values in the shapes of `PackedFactors`."""
        nb, window = len(self.branches), 1
        if self.geometry is not None and self.geometry.keeps_size:
            window = self.geometry.kernel_size
        return down.view(nb, self.num_ranks * window, -1), up.view(nb, self.out, self.num_ranks)

    def bias(self, biases: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return Σ scale · bias of each branch, `[nb, out]`, zeros without biases."""
        stacked = torch.stack(list(biases)) if biases else self.bias_scale.new_zeros(0, self.out)
        return self.bias_scale @ stacked

    def gradients(
        self,
        down: torch.Tensor | None,
        up: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> list[torch.Tensor | None]:
        """Return the gradients of the tensors of this layer from those of its `PackedFactors`."""
        downs: list[torch.Tensor | None] = [None] * len(self.ranks)
        ups = list(downs)
        scaled = up if up is None or self.scale is None else up * self.scale
        for branch, row in enumerate(self.branches):
            end = 0
            for index in row:
                ranks = slice(end, end := end + self.ranks[index])
                if down is not None:
                    downs[index] = _sum(downs[index], self._down_gradient(down[branch], ranks))
                if scaled is not None:
                    ups[index] = _sum(ups[index], scaled[branch, :, ranks])
        if self.geometry is not None:
            ups = [None if each is None else each[..., None, None] for each in ups]
        of_biases = [None] * len(self.biases) if bias is None else list(self.bias_scale.mT @ bias)
        return [gradient for pair in zip(downs, ups, strict=True) for gradient in pair] + of_biases

    def _down_gradient(self, of_down: torch.Tensor, ranks: slice) -> torch.Tensor:
        """Return the gradient of some ranks of `down`, from that of a branch's `PackedFactors.down`."""
        rows = len(of_down) // self.num_ranks  # of one rank
        of_ranks = of_down[ranks.start * rows : ranks.stop * rows]
        return of_ranks if self.geometry is None else original_down(of_ranks, ranks.stop - ranks.start, self.geometry)


def _sum(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    return second if first is None else first + second  # updates of both branches


def pack_factors(
    layouts: Sequence[FactorLayout], tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[PackedFactors]:
    """Return the packed factors of several layers; gradients of the result go to the tensors.

    Args:
        layouts: one per layer.
        tensors: of every layer in turn, (down, up) of each update, and then the biases.
        dtype: of the result.
    """
    packed = iter(_Pack.apply(tuple(layouts), dtype, *tensors))  # type: ignore[no-untyped-call]
    return [PackedFactors(next(packed), next(packed), next(packed) if layout.biases else None) for layout in layouts]


class _Pack(torch.autograd.Function):
    """The packing of `pack_factors`. It saves no tensor, so that each of several backward passes can go through it."""

    @staticmethod
    def forward(
        ctx: Any, layouts: tuple[FactorLayout, ...], dtype: torch.dtype, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return down, up and, where the layer has one, bias of every layer in turn."""
        ctx.layouts, ctx.dtype = layouts, tensors[0].dtype
        ctx.set_materialize_grads(False)
        of_layers = list(_by_layer(layouts, tensors))
        downs = [piece for layout, each in of_layers for piece in layout.down_pieces(each.downs)]
        ups = [piece for layout, each in of_layers for piece in layout.up_pieces(each.ups)]
        flat = torch.cat(downs + ups)
        _scale_ups(layouts, flat)
        packed: list[torch.Tensor] = []
        for (layout, each), factors in zip(of_layers, _views(layouts, flat.to(dtype)), strict=True):
            packed += factors
            if layout.biases:
                packed.append(layout.bias(each.biases).to(dtype))
        return tuple(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the tensors."""
        exact = (None if each is None else each.to(ctx.dtype) for each in gradients)
        found: list[torch.Tensor | None] = []
        for layout in ctx.layouts:
            found += layout.gradients(next(exact), next(exact), next(exact) if layout.biases else None)
        return None, None, *found


def _scale_ups(layouts: Sequence[FactorLayout], flat: torch.Tensor) -> None:
    """Multiply the values of up by their scales, in place."""
    scaled = [(up, layout.scale) for layout, (_, up) in zip(layouts, _views(layouts, flat), strict=True)]
    for up, scale in scaled:
        if scale is not None:
            up.mul_(scale)


def pack_flat(
    layouts: Sequence[FactorLayout], flats: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[PackedFactors]:
    """Return what `pack_factors` does for layers that all have one update of the same rank in each branch.

    With the parameters of a branch in one tensor, a few operations pack all layers, and the gradients are one tensor
    for each branch.

    Args:
        layouts: one per layer, with `is_plain`.
        flats: of each branch, (down, up) of every layer in turn, as one vector.
        dtype: of the result.
    """
    packed = iter(_PackFlat.apply(tuple(layouts), dtype, *flats))  # type: ignore[no-untyped-call]
    return [PackedFactors(down, up, None) for down, up in zip(packed, packed, strict=True)]


class _PackFlat(torch.autograd.Function):
    """The packing of `pack_flat`; it saves no tensor either."""

    @staticmethod
    def forward(
        ctx: Any, layouts: tuple[FactorLayout, ...], dtype: torch.dtype, *flats: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return down and up of every layer in turn."""
        ctx.layouts, ctx.dtype, ctx.device = layouts, flats[0].dtype, flats[0].device
        ctx.set_materialize_grads(False)
        stacked = torch.stack(flats)  # [nb, number of values]
        for layout, (_, up) in zip(layouts, _branch_views(layouts, stacked), strict=True):
            if layout.scale is not None:
                up.mul_(layout.scale)
        packed: list[torch.Tensor] = []
        for layout, (down, up) in zip(layouts, _branch_views(layouts, stacked.to(dtype)), strict=True):
            if layout.geometry is not None:
                kernels = down.unflatten(-1, (-1, *layout.geometry.kernel))  # [nb, R, in, kh, kw]
                packed += [arranged_down(kernels, layout.geometry), up]
            else:
                packed += [down, up]
        return tuple(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the flat tensors."""
        pieces: list[torch.Tensor] = []
        for layout, down, up in zip(ctx.layouts, gradients[::2], gradients[1::2], strict=True):
            for gradient, num_values in zip((down, up), layout.num_values, strict=True):
                if gradient is None:  # not used in this backward pass
                    nb = len(layout.branches)
                    pieces.append(torch.zeros(nb, num_values // nb, dtype=ctx.dtype, device=ctx.device))
                    continue
                exact = gradient.to(ctx.dtype)
                if gradient is down and layout.geometry is not None:
                    exact = original_down(exact, layout.num_ranks, layout.geometry)
                elif gradient is up and layout.scale is not None:
                    exact = exact * layout.scale
                pieces.append(exact.flatten(1))
        return None, None, *torch.cat(pieces, dim=1)


def _branch_views(layouts: Sequence[FactorLayout], stacked: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `[nb, R, width]` and `[nb, out, R]` of every layer as views of `[nb, number of values]`."""
    sizes = [size // len(layout.branches) for layout in layouts for size in layout.num_values]
    parts = stacked.split(sizes, dim=1)
    return [
        (down.unflatten(1, (layout.num_ranks, -1)), up.unflatten(1, (layout.out, layout.num_ranks)))
        for layout, down, up in zip(layouts, parts[::2], parts[1::2], strict=True)
    ]


@dataclass(frozen=True)
class _LayerTensors:
    """The tensors of one layer: factors of each update, and the biases that exist."""

    downs: Sequence[torch.Tensor]
    ups: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]


def _by_layer(
    layouts: Sequence[FactorLayout], tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[FactorLayout, _LayerTensors]]:
    remaining = iter(tensors)
    for layout in layouts:
        factors = list(islice(remaining, 2 * len(layout.ranks)))
        yield layout, _LayerTensors(factors[::2], factors[1::2], list(islice(remaining, len(layout.biases))))


def _views(layouts: Sequence[FactorLayout], flat: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (down, up) of every layer as views of all values: those of down of all layers, then those of up."""
    num_downs, num_ups = zip(*(layout.num_values for layout in layouts), strict=True)
    parts = flat.split([*num_downs, *num_ups])
    downs, ups = parts[: len(layouts)], parts[len(layouts) :]
    return [layout.shaped(down, up) for layout, down, up in zip(layouts, downs, ups, strict=True)]
