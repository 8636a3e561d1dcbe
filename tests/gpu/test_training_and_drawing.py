"""The default method on a GPU: it trains, repeats itself, and agrees with the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamartist_pipeline.api import draw_images, step_values
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.training import fit
from dreamartist_pipeline.params import DeviceParams, SamplerParams, TrainingParams
from sampling import random_concept
from speed.designs import make_data, our_design
from speed.settings import Settings, read_training

SIDE_PX = 32
NUM_STEPS = 12  # more than the steps between two reads of the loss on a GPU


def load(folder: Path, device: str, dtype: str = "float32") -> Backbone:
    return load_backbone(BaseModelFiles(folder), DeviceParams.model_validate({"device": device, "dtype": dtype}))


@pytest.fixture(scope="module")
def params() -> TrainingParams:
    return read_training().model_copy(update={"num_steps": NUM_STEPS})


@pytest.fixture(scope="module")
def exact() -> None:
    """Turn off TF32, which keeps ten bits of float32's mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def train(backbone: Backbone, params: TrainingParams) -> tuple[list[float], list[torch.Tensor]]:
    """Return the losses and copies of the trained tensors."""
    design = our_design(backbone, params)
    history = fit(design.model, make_data(backbone, params, SIDE_PX), params)
    tensors = [p.detach().cpu().clone() for group in design.model.groups for p in group.parameters]
    return [row["loss"] for row in history], tensors


def test_the_default_method_trains(tiny_base_model: Path, device: str, params: TrainingParams) -> None:
    losses, tensors = train(load(tiny_base_model, device), params)

    assert len(losses) == NUM_STEPS
    assert np.isfinite(losses).all()
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors)


def test_a_training_repeats_itself_bit_by_bit(tiny_base_model: Path, device: str, params: TrainingParams) -> None:
    backbone = load(tiny_base_model, device)

    (losses, tensors), (again, tensors_again) = train(backbone, params), train(backbone, params)

    assert losses == again
    assert all(torch.equal(*pair) for pair in zip(tensors, tensors_again, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_trains_in_half_precision(tiny_base_model: Path, device: str, params: TrainingParams, dtype: str) -> None:
    if device == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")

    losses, tensors = train(load(tiny_base_model, device, dtype), params)

    assert np.isfinite(losses).all()
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in tensors)


@pytest.fixture(scope="module")
def concept(tiny_base_model: Path, params: TrainingParams) -> Concept:
    return random_concept(Settings(BaseModelFiles(tiny_base_model), load(tiny_base_model, "cpu"), params, SIDE_PX))


@pytest.mark.usefixtures("exact")
def test_the_gradients_of_a_step_are_those_of_the_cpu(tiny_base_model: Path, device: str, concept: Concept) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    step = ("a {pt1}", "a {pt1}", latents, noise, torch.tensor([100, 700]))

    on_device, on_cpu = (step_values(load(tiny_base_model, name), concept, *step) for name in (device, "cpu"))

    torch.testing.assert_close(on_device.loss.cpu(), on_cpu.loss, rtol=1e-4, atol=1e-6)
    assert on_device.gradients.keys() == on_cpu.gradients.keys()
    for name, gradient in on_cpu.gradients.items():
        error = (on_device.gradients[name].cpu() - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-3, name


@pytest.mark.usefixtures("exact")
def test_a_picture_is_that_of_the_cpu(tiny_base_model: Path, device: str, concept: Concept) -> None:
    sampler = SamplerParams(num_inference_steps=5, batch_size=2)

    on_device, on_cpu = (
        draw_images(load(tiny_base_model, name), concept, "a {pt1}", sampler=sampler) for name in (device, "cpu")
    )

    for ours, theirs in zip(on_device, on_cpu, strict=True):
        difference = np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)
        assert np.abs(difference).mean() < 1


def test_memory_does_not_grow_over_the_steps(tiny_base_model: Path, device: str, params: TrainingParams) -> None:
    if device != "cuda":
        pytest.skip("only a GPU counts its memory")
    backbone = load(tiny_base_model, device)
    allocated: list[int] = []
    design, data = our_design(backbone, params), make_data(backbone, params, SIDE_PX)
    long = params.model_copy(update={"num_steps": 200})

    fit(design.model, data, long, on_step=lambda _: allocated.append(torch.cuda.memory_allocated()))

    assert max(allocated[100:]) <= max(allocated[50:100])


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "schedule_free"])
def test_every_optimizer_trains(
    tiny_base_model: Path, device: str, make_training_params: Callable[..., TrainingParams], optimizer: str
) -> None:
    constant = {"kind": "constant"}
    groups = {
        f"lora_{network}": [{"lr": 1.0, "rank": 2, "branch": branch, "layers": [layers]} for branch in ("p", "n")]
        for network, layers in (("unet", r"re:.*\.attn.?$"), ("text_encoder", "re:.*mlp$"))
    }
    chosen = make_training_params(optimizer=optimizer, schedule=constant, **groups)

    losses, tensors = train(load(tiny_base_model, device), chosen)

    assert np.isfinite(losses).all()
    assert all(tensor.isfinite().all() for tensor in tensors)
