"""Counting the memory and the operations of a step on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.test_training import make_model
from dreamartist_pipeline.core import memory
from dreamartist_pipeline.core.memory import StepShape, count_step, measure_step
from dreamartist_pipeline.core.parameter_groups import ParameterGroup
from dreamartist_pipeline.core.training_step import TrainableModel

META = torch.device("meta")
SHAPE = StepShape(latents=(4, 8, 8), num_rows=5, num_prompts=2, num_tokens=3)
FLOAT = 4  # bytes


class Convolutions(nn.Module):
    """Two trained 1 × 1 convolutions with a sigmoid between them."""

    def __init__(self, device: torch.device = META, is_checkpointed: bool = False) -> None:
        super().__init__()
        with device:
            self.first, self.second = nn.Conv2d(4, 16, 1, bias=False), nn.Conv2d(16, 4, 1, bias=False)
        self.is_checkpointed = is_checkpointed

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).sigmoid())

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor, framing: None) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.is_checkpointed else self.inner(x)


def trainable(module: nn.Module, forward: Callable[..., torch.Tensor] | None = None) -> TrainableModel:
    """Return a model with one branch without a text encoder."""
    group = ParameterGroup("all", "adapters", "positive", 1.0, tuple(module.parameters()))
    return dataclasses.replace(
        make_model(num_branches=1),
        denoise=forward or module,
        encode=lambda tokens: torch.zeros(len(tokens), 3, 4, device=tokens.ids.device),
        groups=(group,),
        latent_adapters=(),
    )


@pytest.mark.parametrize("micro_batch", [None, 2, 1, 9])
def test_what_is_kept_is_counted_in_bytes(micro_batch: int | None) -> None:
    rows = min(micro_batch or 5, 5)
    counted = count_step(trainable(Convolutions()), SHAPE, micro_batch)
    latents, hidden = rows * 4 * 64 * FLOAT, rows * 16 * 64 * FLOAT
    # input, output of the sigmoid, prediction and its difference to the latents, and a few small tensors
    assert counted.kept_bytes == pytest.approx(hidden + 4 * latents, abs=latents + 300)
    assert counted.kept_bytes < counted.peak_bytes < counted.kept_bytes + 3 * hidden
    # forward, gradient of the weights (both), gradient of the input (the second): 2 · 4 · 16 a pixel each
    assert counted.flops == 5 * 5 * 2 * 4 * 16 * 64


def test_checkpointing_keeps_less_and_computes_more() -> None:
    plain, checkpointed = (count_step(trainable(Convolutions(is_checkpointed=c)), SHAPE) for c in (False, True))
    assert plain.kept_bytes - checkpointed.kept_bytes == pytest.approx(5 * 16 * 64 * FLOAT, abs=300)  # of the sigmoid
    assert checkpointed.flops == plain.flops * 6 / 5  # the first product again


def test_attention_does_not_keep_its_weights() -> None:
    layer = nn.Linear(16, 16, device=META)

    def forward(x: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor, framing: None) -> torch.Tensor:
        rows = layer(x.reshape(len(x), 1, 16, 16))
        mask = torch.ones(16, 16, dtype=torch.bool, device=META)
        return F.scaled_dot_product_attention(rows, rows, rows, attn_mask=mask).reshape(x.shape)

    before = F.scaled_dot_product_attention
    longer = dataclasses.replace(SHAPE, latents=(4, 8, 8))
    counted = count_step(trainable(layer, forward), longer)
    assert counted.kept_bytes < 10 * 5 * 256 * FLOAT
    assert counted.flops > 0
    assert F.scaled_dot_product_attention is before


def test_a_step_is_counted_again_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainable(Convolutions(is_checkpointed=True))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "call_on_meta", lambda operator, args, kwargs: operator(*args, **kwargs))
        expected = count_step(model, SHAPE)
    assert count_step(model, SHAPE) == count_step(model, SHAPE) == expected


def test_a_measured_step_changes_nothing() -> None:
    torch.manual_seed(0)
    module = Convolutions(torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    calls: list[int] = []
    module.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    assert measure_step(trainable(module), SHAPE, torch.device("cpu"), micro_batch=2) > 0
    assert calls == [2] * 6  # three passes, twice
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(map(torch.equal, before, module.parameters()))


def test_a_step_with_words_and_adapters_in_both_branches_is_counted() -> None:
    model = make_model(dropout=0.5)
    measure_step(model, dataclasses.replace(SHAPE, latents=(2, 2, 2)), torch.device("cpu"))
    assert all(layer.training for stack in model.latent_adapters for layer in stack.layers.values())
