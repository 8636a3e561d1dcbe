"""Frozen weights in 8 bits: rounded per output, half the memory, and trained on as on the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline, open_base_model
from dreamartist_pipeline.backbones.concepts import start_concept
from dreamartist_pipeline.backbones.quantization import Int8Linear, quantize_linears, stored_bytes
from dreamartist_pipeline.core import devices
from dreamartist_pipeline.core.devices import check_device
from dreamartist_pipeline.core.image_set import describe_images
from dreamartist_pipeline.core.parameter_groups import parameter_groups
from dreamartist_pipeline.core.training import fit
from dreamartist_pipeline.core.training_step import Execution, Steps, training_state
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, SamplerParams, TrainingParams
from dreamartist_pipeline.pipelines.training.data import training_data
from dreamartist_pipeline.pipelines.training.memory import MemoryPlan, estimate_memory, step_shape
from dreamartist_pipeline.pipelines.training.trainable import trainable_model
from pipelines.test_training_memory import CAPTION, MASK, REGULARIZATION, picture
from refusals import says

MakeParams = Callable[..., TrainingParams]
INT8, PLAIN = DeviceParams(device="cpu", quantize="int8"), DeviceParams(device="cpu")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(InputError, check=says(expected="device.quantize=int8", remedy="pip install torchao")):
        check_device(INT8)
    check_device(PLAIN)


def test_a_regularization_set_of_quantized_weights_is_another(make_training_params: MakeParams) -> None:
    keys = [describe_images("beef", ["a cat"], "", SamplerParams(), 0, device)["key"] for device in (PLAIN, INT8)]
    assert keys[0] != keys[1]


def test_weights_are_rounded_to_255_levels_per_output() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.Sequential(nn.Linear(32, 8))).requires_grad_(False)
    plain = network[0].weight.clone()
    before = sum(stored_bytes(parameter) for parameter in network.parameters())
    quantize_linears(network)
    weight = network[0].weight
    steps = plain.abs().amax(dim=1, keepdim=True) / 127
    assert ((weight - plain).abs() <= 0.51 * steps).all()
    assert sum(stored_bytes(parameter) for parameter in network.parameters()) < 0.4 * before  # float32 before
    assert isinstance(network[0], nn.Linear)
    assert isinstance(network[1][0], Int8Linear)


def test_a_base_model_opens_with_int8_weights(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    pytest.importorskip("torchao")
    quantized, plain = (open_base_model(tiny_base_model, device) for device in (INT8, PLAIN))
    assert quantized.fingerprint == plain.fingerprint
    assert quantized.layer_shapes == plain.layer_shapes
    assert any(isinstance(module, Int8Linear) for module in quantized.unet.modules())
    params = make_training_params(num_steps=2)
    gradients = []
    for backbone in (plain, quantized):
        new = start_concept(backbone, params, 1, 0)
        new.backbone.checkpoint_gradients()
        images = [(caption, read()) for caption, read in REGULARIZATION]
        data = training_data(new.backbone, new.prompts, picture(), MASK, images, params, CAPTION)
        model = trainable_model(new, parameter_groups(new.stacks, new.words, 1e-3))
        steps = Steps(model, data, params, training_state(model, params), Execution())
        steps.gradients(0)
        gradients.append([parameter.grad.clone() for parameter in steps.state.parameters])  # type: ignore[union-attr]
        assert len(fit(model, data, params)) == 2
    for ours, theirs in zip(*gradients, strict=True):  # the tolerance of 8 bits
        assert 0 < (ours - theirs).norm() <= 0.1 * theirs.norm()


def test_the_estimate_counts_int8_weights(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    pytest.importorskip("torchao")
    params, plan = make_training_params(), MemoryPlan(checkpointing=True)
    estimates = []
    for quantize in (False, True):
        outline = load_outline(BaseModelFiles(tiny_base_model), torch.bfloat16, quantize)
        planned = start_concept(outline, params, 1, 0)
        shape = step_shape(planned, params, CAPTION, None)
        estimates.append(estimate_memory(planned, params, shape, plan))
    plain, quantized = estimates
    assert 0.5 * plain.weights < quantized.weights < 0.9 * plain.weights
