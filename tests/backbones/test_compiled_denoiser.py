"""A compiled network with adapters computes what the plain one does."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.adapters import inject
from dreamartist_pipeline.params import ResolvedGroup


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_network_with_adapters_has_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 4, 6))
    groups = [
        ResolvedGroup(name=f"net.{i}.{branch}", rank=2, layers=("0", "3"), lr=1.0, branch=branch)
        for i, branch in enumerate(("negative", "positive"))
    ]
    stack = inject(network, groups, 2, torch.Generator().manual_seed(0))
    parameters = [parameter for each in stack.parameters_by_group().values() for parameter in each]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    plain, text = copy.deepcopy(network), nn.Linear(1, 1)
    networks: dict[str, Any] = {"unet": network, "text_encoder": text}
    Backbone.compile_denoiser(cast(Backbone, SimpleNamespace(networks=networks, tokenizers={"text_encoder": None})))
    assert network._compiled_call_impl is not None
    assert text._compiled_call_impl is None
    rows = torch.randn(4, 4, 2, 2)
    outputs = [each(rows) for each in (network, plain)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
