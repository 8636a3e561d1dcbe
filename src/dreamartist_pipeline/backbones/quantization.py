"""Frozen weights in 8 bits: int8 with a scale per output, half the memory of bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Int8Linear(nn.Linear):
    """A frozen Linear with an int8 weight, which is dequantized at every access of `weight`.

    The dequantized copy is kept for the backward pass unless gradient checkpointing repeats the forward pass.

    Attributes:
        quantized: a tensor of torchao with the shape and dtype of the dequantized weight.
    """

    def __init__(self, layer: nn.Linear) -> None:
        """Take over the weight of a layer that torchao has quantized, and its bias."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.quantized, self.bias = layer.weight, layer.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dequantized weight `[out, in]`."""
        quantized: Any = self.quantized
        weight: torch.Tensor = quantized.dequantize()
        return weight


def quantize_linears(network: nn.Module) -> None:
    """Replace all Linears of a frozen network by `Int8Linear`, in place.

    The values are rounded to 255 levels per output, symmetric around zero (torchao's int8 weight-only quantization).
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig())
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear):
            network.set_submodule(name, Int8Linear(layer))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor in memory; those of its parts for a quantized one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in names)
