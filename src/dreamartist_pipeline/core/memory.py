"""The memory and the arithmetic of a training step, counted without running it, or measured.

The step itself is run on tensors of the right shapes: on the meta device, where tensors have no contents, its memory
and operations are counted; on another device, its duration is measured.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dreamartist_pipeline.core.branches import combine, repeat, rows_of
from dreamartist_pipeline.core.meta_operators import call_on_meta, storages_in
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, detached_leaves
from dreamartist_pipeline.core.training_step import TrainableModel, encode_prompts

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {  # it has attention on GPUs only
    _ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query.shape, key.shape, value.shape),
    _ATTENTION_BACKWARD: lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(
        gradient.shape, query.shape, key.shape, value.shape
    ),
}


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step.

    Attributes:
        latents: (C, h, w).
        num_rows: B, of the reference image and the regularization set.
        num_prompts: P, the distinct prompts of a step.
        num_tokens: L, of all text encoders.
        num_reconstructed: rows that are decoded for the reconstruction loss.
    """

    latents: tuple[int, int, int]
    num_rows: int
    num_prompts: int
    num_tokens: int
    num_reconstructed: int = 0


@dataclass(frozen=True)
class StepCount:
    """The memory and the arithmetic of a step, without weights and optimizer.

    Attributes:
        kept_bytes: kept at the end of a forward pass for its backward pass.
        peak_bytes: the most at any time.
        flops: of all passes of the step, including what gradient checkpointing repeats.
    """

    kept_bytes: int
    peak_bytes: int
    flops: int


def count_step(model: TrainableModel, shape: StepShape, micro_batch: int | None = None) -> StepCount:
    """Count a step of a model on the meta device. Attention is counted as fused: it does not keep its weights.

    Args:
        model: on the meta device, with gradient checkpointing turned on or off.
        shape: of the step.
        micro_batch: rows of one pass; None for all.
    """
    counter, kept = _Counter(), 0

    def note_kept() -> None:
        nonlocal kept
        kept = counter.bytes_alive

    size = min(micro_batch or shape.num_rows, shape.num_rows)
    with _without_dropout(model), _fused_attention(), counter:
        _run_pass(model, shape, size, torch.device("meta"), note_kept)
    return StepCount(kept, counter.most_bytes, round(counter.flops * shape.num_rows / size))


def measure_step(
    model: TrainableModel, shape: StepShape, device: torch.device, micro_batch: int | None = None
) -> float:
    """Run the passes of a step on a device and return the seconds of the second run; gradients are discarded.

    Raises:
        torch.OutOfMemoryError: the step does not fit.
    """
    size = min(micro_batch or shape.num_rows, shape.num_rows)
    with _without_dropout(model):
        for _ in range(2):  # the first run chooses algorithms and allocates
            _synchronize(device)
            started = time.perf_counter()
            for _ in range(0, shape.num_rows, size):
                _run_pass(model, shape, size, device)
            _synchronize(device)
    return time.perf_counter() - started


def _run_pass(
    model: TrainableModel,
    shape: StepShape,
    num_rows: int,
    device: torch.device,
    after_forward: Callable[[], None] = lambda: None,
) -> None:
    """Run the forward and backward pass of `num_rows` rows of zeros, and discard the gradients."""
    branches = model.num_branches
    tokens = PromptTokens(torch.zeros(shape.num_prompts, branches, shape.num_tokens, dtype=torch.long, device=device))
    with torch.no_grad() if model.has_constant_prompts else nullcontext():
        conditioning = encode_prompts(model, tokens)
    leaves, copied = detached_leaves(conditioning)
    rows = torch.zeros(num_rows, dtype=torch.long, device=device)
    latents = torch.zeros(num_rows, *shape.latents, device=device)
    of_rows = copied[rows_of(rows, shape.num_prompts, branches)]
    prediction = model.denoise(repeat(latents, branches), repeat(rows, branches), of_rows, None)
    combined = combine(prediction.float(), torch.ones(num_rows, device=device), branches)
    loss = (combined - latents).square().mean()
    num_decoded = min(num_rows, shape.num_reconstructed)
    if num_decoded and model.decode is not None:
        loss = loss + model.decode(combined[:num_decoded]).abs().mean()
    after_forward()
    del prediction, combined
    torch.autograd.backward(loss)
    if leaves:
        torch.autograd.backward([tensor for tensor, _ in leaves], [leaf.grad for _, leaf in leaves])
    for parameter in _parameters(model):
        parameter.grad = None


def _parameters(model: TrainableModel) -> Iterator[nn.Parameter]:
    for group in model.groups:
        yield from group.parameters


@contextmanager
def _without_dropout(model: TrainableModel) -> Iterator[None]:
    """Turn dropout off: it needs masks, which are small beside everything else."""
    stacks = (*model.latent_adapters, *model.prompt_adapters)
    for adapters in stacks:
        adapters.train(False)
    try:
        yield
    finally:
        for adapters in stacks:
            adapters.train()


def _synchronize(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)


class _Counter(TorchDispatchMode):
    """Counts the bytes of the tensors that are created in this context, and the operations.

    Attributes:
        bytes_alive: of the tensors that exist at this moment.
        most_bytes: the most so far.
        flops: additions and multiplications of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_alive, self.most_bytes, self.flops = 0, 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call_on_meta(func, args, kwargs or {})
        if func.overloadpacket in _FLOPS:
            self.flops += _FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        given = {storage._cdata for storage in storages_in(args)}  # of views, and of tensors from outside the context
        for storage in storages_in(result):
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self.bytes_alive += storage.nbytes()
        self.most_bytes = max(self.most_bytes, self.bytes_alive)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.bytes_alive -= self._sizes.pop(key)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Use a fused operator for attention: on the meta device, torch chooses the one that keeps all its weights."""
    with mock.patch.object(F, "scaled_dot_product_attention", _attention):
        yield


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    output: torch.Tensor = _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output
