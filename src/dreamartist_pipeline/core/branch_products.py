"""The products of an adapted layer, each with its own backward pass.

A layer of a stacked batch computes y = W x + bias + up_b (g · (down_b x)) for the rows of every branch b, where W and
bias are frozen and g is a gate on the ranks, for dropout. The gradients are written out because autograd would keep and
add more tensors: here the update is added to y, and its gradient to that of x, in place.

The layouts are chosen by measurement. The libraries multiply matrices with a small number of columns (the rank) up to
nine times as slowly as matrices with a small number of rows, so the rank activations are `[..., R, N]`, never
`[..., N, R]`. `benchmarks/adapted_layers.py` compares these products with others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from dreamartist_pipeline.errors import InputError


class LinearProduct(torch.autograd.Function):
    """The product of a linear layer; see `forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return y `[nb·B, ..., out]`.

        Args:
            ctx: of autograd.
            x: `[nb·B, ..., in]`.
            weight: `[out, in]`, frozen.
            bias: `[out]`, frozen, or None.
            down: `[nb, R, in]`.
            up: `[nb, out, R]`.
            gate: broadcasts to the rank activations `[nb, R, N]`, N = B · …; not differentiated.
        """
        y = F.linear(x, weight, bias)
        rows = x.reshape(len(down), -1, x.shape[-1])  # [nb, N, in]
        hidden = torch.bmm(down, rows.mT)  # [nb, R, N]
        if gate is not None:
            hidden *= gate
        y.view(len(up), -1, y.shape[-1]).baddbmm_(hidden.mT, up.mT)
        ctx.save_for_backward(rows, weight, down, up, hidden, gate)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, down and up."""
        rows, weight, down, up, hidden, gate = ctx.saved_tensors
        of_y = gradient.reshape(len(up), -1, gradient.shape[-1])  # [nb, N, out]
        of_hidden = torch.bmm(up.mT, of_y.mT)  # [nb, R, N]
        if gate is not None:
            of_hidden *= gate
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(gradient.reshape(-1, gradient.shape[-1]), weight).view(ctx.shape)
            of_x.view(rows.shape).baddbmm_(of_hidden.mT, down)
        return of_x, None, None, torch.bmm(of_hidden, rows), torch.bmm(hidden, of_y).mT, None


@dataclass(frozen=True)
class ConvGeometry:
    """How a kernel moves over its input, (vertical, horizontal) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, layer: nn.Conv2d, name: str) -> ConvGeometry:
        """Return the geometry of a layer.

        Raises:
            InputError: padding='same' with another number of zeros on each side.
        """
        kernel, dilation = (layer.kernel_size[0], layer.kernel_size[1]), (layer.dilation[0], layer.dilation[1])
        spans = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
        match layer.padding:
            case "valid":
                padding = (0, 0)
            case "same":
                if any(span % 2 for span in spans):
                    raise InputError(
                        expected=f"a convolution {name!r} with as many zeros on each side",
                        got=f"padding='same' and a kernel of {kernel}",
                        remedy="exclude it from the LoRA layers",
                    )
                padding = (spans[0] // 2, spans[1] // 2)
            case (vertical, horizontal):
                padding = (int(vertical), int(horizontal))
        return cls(kernel, (layer.stride[0], layer.stride[1]), padding, dilation)

    @cached_property
    def kernel_size(self) -> int:
        """The number of values of a kernel."""
        return math.prod(self.kernel)

    @cached_property
    def spans(self) -> tuple[int, int]:
        """The distance between the first and the last position of the kernel."""
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)

    @cached_property
    def keeps_size(self) -> bool:
        """Whether the output is as large as the input, with stride 1."""
        return self.stride == (1, 1) and (2 * self.padding[0], 2 * self.padding[1]) == self.spans

    @cached_property
    def is_pointwise(self) -> bool:
        """Whether the convolution is a linear layer on the channels of every position."""
        return self.keeps_size and self.kernel_size == 1

    def output_size(self, x: torch.Tensor) -> tuple[int, int]:
        """Return (h, w) of the outputs for inputs `[n, in, H, W]`."""
        sides = zip(x.shape[2:], self.padding, self.spans, self.stride, strict=True)
        height, width = ((side + 2 * padding - span - 1) // stride + 1 for side, padding, span, stride in sides)
        return height, width

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the values under the kernel at every position: `[n, C, H, W]` to `[n, C · kh · kw, h · w]`.

        The same as `F.unfold`, up to five times as fast on a CPU.
        """
        if self.is_pointwise:
            return x.flatten(2)
        (vertical, horizontal), (sh, sw), (dh, dw) = self.padding, self.stride, self.dilation
        padded = F.pad(x, (horizontal, horizontal, vertical, vertical))
        windows = padded.unfold(2, self.spans[0] + 1, sh).unfold(3, self.spans[1] + 1, sw)  # [n, C, h, w, ., .]
        windows = windows[..., ::dh, ::dw].permute(0, 1, 4, 5, 2, 3)
        return windows.reshape(x.shape[0], x.shape[1] * self.kernel_size, -1)

    def sum_of_windows(self, windows: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """Add windows `[n, C · kh · kw, h · w]` where they overlap, `[n, C, H · W]`: the adjoint of `windows`."""
        if self.is_pointwise:
            return windows
        merged = windows.view(1, -1, windows.shape[2])  # one image of many channels: torch loops over images
        image = F.fold(merged, size, self.kernel, self.dilation, self.padding, self.stride)
        return image.view(windows.shape[0], -1, math.prod(size))


class ConvProduct(torch.autograd.Function):
    """The product of a convolution; see `forward`.

    Where the convolution keeps the size of its input, `down` is one matrix product whose outputs are all kernel
    positions of all ranks, and the shifted results are added. It needs no windows of x, which would be kh · kw times as
    large, and is faster than a convolution with few output channels. Otherwise `down` is a product with the windows
    of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        gate: torch.Tensor | None,
        geometry: ConvGeometry,
    ) -> torch.Tensor:
        """Return y `[nb·B, out, h, w]`.

        Args:
            ctx: of autograd.
            x: `[nb·B, in, H, W]`.
            weight: `[out, in, kh, kw]`, frozen.
            bias: `[out]`, frozen, or None.
            down: from `arranged_down`, `[nb, R · kh · kw, in]` or `[nb, R, in · kh · kw]`.
            up: `[nb, out, R]`.
            gate: broadcasts to the rank activations `[nb·B, R, h · w]`; not differentiated.
            geometry: of the layer.
        """
        y = F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)
        inputs = x.flatten(2) if geometry.keeps_size else geometry.windows(x)
        hidden = torch.bmm(_of_rows(down, len(x)), inputs)  # [nb·B, R (· kh · kw), h · w]
        if geometry.keeps_size:
            hidden = geometry.sum_of_windows(hidden, x.shape[2:])  # [nb·B, R, h · w]
        if gate is not None:
            hidden *= gate
        _flat(y).baddbmm_(_of_rows(up, len(x)), hidden)
        ctx.save_for_backward(x, weight, down, up, hidden, gate)
        ctx.geometry = geometry
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, down and up."""
        x, weight, down, up, hidden, gate = ctx.saved_tensors
        geometry: ConvGeometry = ctx.geometry
        of_y = gradient.flatten(2)  # [nb·B, out, h · w]
        of_up = _sum_of_rows(torch.bmm(hidden, of_y.mT), len(up)).mT  # [nb, out, R]
        of_hidden = torch.bmm(_of_rows(up, len(x)).mT, of_y)  # [nb·B, R, h · w]
        if gate is not None:
            of_hidden *= gate
        if geometry.keeps_size:
            inputs = x.flatten(2)
            of_hidden = geometry.windows(of_hidden.view(len(x), -1, *gradient.shape[2:]))
        else:
            inputs = geometry.windows(x)
        of_down = _sum_of_rows(torch.bmm(of_hidden, inputs.mT), len(down))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x, transposed = _frozen_input_gradient(gradient, x, weight, geometry), _of_rows(down, len(x)).mT
            if geometry.keeps_size:
                _flat(of_x).baddbmm_(transposed, of_hidden)
            else:
                of_x += geometry.sum_of_windows(torch.bmm(transposed, of_hidden), x.shape[2:]).view(x.shape)
        return of_x, None, None, of_down, of_up, None, None


def _frozen_input_gradient(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry
) -> torch.Tensor:
    of_x: torch.Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), 1,
        (True, False, False),
    )[0]  # fmt: skip
    return of_x


class MergedLayer(NamedTuple):
    """The weights of a layer with its updates merged, for forward passes without gradients.

    Attributes:
        weights: of each branch, `[nb, out, in]` or `[nb, out, in, kh, kw]`; nb is 1 where all branches have the same.
        biases: `[nb, out]`, or None.
        geometry: of a convolution.
    """

    weights: torch.Tensor
    biases: torch.Tensor | None
    geometry: ConvGeometry | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return y for the rows x of a stacked batch."""
        biases = [None] * len(self.weights) if self.biases is None else self.biases
        if self.geometry is not None:
            geometry, rows = self.geometry, x.chunk(len(self.weights))
            outputs = [
                F.conv2d(each, weight, bias, geometry.stride, geometry.padding, geometry.dilation)
                for each, weight, bias in zip(rows, self.weights, biases, strict=True)
            ]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if len(self.weights) == 1:
            return F.linear(x, self.weights[0], biases[0])
        flat = x.reshape(len(self.weights), -1, x.shape[-1])  # [nb, N, in]
        transposed = self.weights.mT
        y = flat.bmm(transposed) if self.biases is None else self.biases[:, None].baddbmm(flat, transposed)
        return y.view(*x.shape[:-1], -1)


def arranged_down(down: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """Return the kernels of `down` `[..., R, in, kh, kw]` as the matrix that `ConvProduct` takes.

    `[..., R · kh · kw, in]` with flipped kernels, as the sum of shifted products needs them, or
    `[..., R, in · kh · kw]`.
    """
    if not geometry.keeps_size:
        return down.flatten(-3)
    kernels: torch.Tensor = down.flatten(-2)  # [..., R, in, kh · kw]
    if geometry.kernel_size > 1:
        kernels = kernels.flip(-1)
    return kernels.mT.flatten(-3, -2)


def original_down(matrix: torch.Tensor, rank: int, geometry: ConvGeometry) -> torch.Tensor:
    """Return `[..., R, in, kh, kw]` from the matrix of `arranged_down`."""
    original: torch.Tensor
    if geometry.keeps_size:
        kernels = matrix.unflatten(-2, (rank, geometry.kernel_size))  # [..., R, kh · kw, in]
        if geometry.kernel_size > 1:
            kernels = kernels.flip(-2)
        original = kernels.mT.unflatten(-1, geometry.kernel)
    else:
        original = matrix.unflatten(-1, (-1, *geometry.kernel))
    return original


def _of_rows(factors: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Repeat the factors of each branch `[nb, ...]` for its rows, `[num_rows, ...]`."""
    num_branches, height, width = factors.shape
    repeated = factors.unsqueeze(1).expand(num_branches, num_rows // num_branches, height, width)
    return repeated.reshape(num_rows, height, width)


def _sum_of_rows(products: torch.Tensor, num_branches: int) -> torch.Tensor:
    """Sum `[nb·B, ...]` over the rows of each branch, `[nb, ...]`."""
    return products.view(num_branches, -1, *products.shape[1:]).sum(1)


def _flat(rows: torch.Tensor) -> torch.Tensor:
    """Return `[n, C, h, w]` as `[n, C, h · w]`, always as a view, to be changed in place."""
    return rows.view(rows.shape[0], rows.shape[1], -1)
