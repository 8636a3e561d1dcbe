"""Diffusers' loader on the layout of Stable Diffusion with all layers adapted."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.sd import V1_NAMES as NAMES
from dreamartist_pipeline.backbones.lora_files import (
    Probe,
    base_prediction,
    concept_predictions,
    file_prediction,
    make_probe,
)
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.interop.branch_adapters import (
    BranchAdapter,
    LoRAFactors,
    branch_adapter,
    build_concept,
)
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.kohya import read_kohya, write_kohya
from dreamartist_pipeline.interop.layer_names import known_to_a1111, known_to_comfyui
from dreamartist_pipeline.interop.peft_files import write_peft
from dreamartist_pipeline.params import DeviceParams

FACTS = FileFacts("fox", "", "v_prediction", names=NAMES)
Modules = dict[str, dict[str, nn.Linear | nn.Conv2d]]


@pytest.fixture(scope="module", params=[False, True], ids=["conv-projection", "linear-projection"])
def backbone(request: pytest.FixtureRequest, tiny_base_model: Path) -> Backbone:
    """The tiny base model with a UNet of Stable Diffusion 1.x's (2.x's) blocks, narrow."""
    tiny = load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=2,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
            sample_size=16,
            use_linear_projection=request.param,
        )
    return dataclasses.replace(tiny, networks=tiny.networks | {"unet": unet.eval().requires_grad_(False)})


def modules_of(backbone: Backbone) -> Modules:
    """Return network -> every Linear and Conv2d, by name."""
    networks = {"unet": backbone.unet, "text_encoder": backbone.text_encoder}
    return {
        network: {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        for network, module in networks.items()
    }


@pytest.fixture(scope="module")
def concept(backbone: Backbone) -> Concept:
    """A LoRA of rank 1, 2 or 3 and of another scale in every layer there is, in both branches."""
    generator = torch.Generator().manual_seed(0)

    def factors(index: int, layer: nn.Module) -> LoRAFactors:
        rank, shape = 1 + index % 3, layer.weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.1
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.1
        return LoRAFactors(down, up, 0.5 + index % 5)

    adapters = {
        branch: BranchAdapter(
            {
                network: {name: factors(i, layer) for i, (name, layer) in enumerate(layers.items())}
                for network, layers in modules_of(backbone).items()
            }
        )
        for branch in ("negative", "positive")
    }
    return build_concept(adapters, (), backbone.identity)


@pytest.fixture(scope="module")
def probe(backbone: Backbone) -> Probe:
    return make_probe(backbone)


@pytest.fixture(scope="module")
def predictions(backbone: Backbone, concept: Concept, probe: Probe) -> dict[str, torch.Tensor]:
    """Return what each branch of the concept predicts, and the base model: `base`."""
    return concept_predictions(backbone, concept, probe) | {"base": base_prediction(backbone, probe)}


@pytest.mark.parametrize("branch", ["negative", "positive"])
@pytest.mark.parametrize("write", [write_kohya, write_peft])
def test_diffusers_takes_every_layer_and_predicts_as_the_concept_does(
    backbone: Backbone,
    concept: Concept,
    probe: Probe,
    predictions: dict[str, torch.Tensor],
    write: type,
    branch: str,
) -> None:
    adapter = branch_adapter(concept, branch)
    loaded = file_prediction(backbone, write(adapter, FACTS, torch.float32), "x", probe)
    assert loaded.layers == {".".join(at) for at in adapter.by_layer()}
    torch.testing.assert_close(loaded.prediction, predictions[branch], rtol=1e-4, atol=1e-5)
    assert (predictions[branch] - predictions["base"]).abs().max() > 0.1


@pytest.fixture(scope="module")
def biased(backbone: Backbone, concept: Concept) -> Concept:
    """The concept with a bias in every other layer."""
    generator = torch.Generator().manual_seed(1)

    def with_bias(index: int, factors: LoRAFactors) -> LoRAFactors:
        bias = torch.randn(len(factors.up), generator=generator) * 0.1
        return dataclasses.replace(factors, bias=bias if index % 2 else None)

    adapters = {
        of_branch: BranchAdapter(
            {
                network: {name: with_bias(i, factors) for i, (name, factors) in enumerate(layers.items())}
                for network, layers in branch_adapter(concept, of_branch).networks.items()
            }
        )
        for of_branch in ("negative", "positive")
    }
    return build_concept(adapters, (), backbone.identity)


@pytest.fixture(scope="module")
def biased_predictions(backbone: Backbone, biased: Concept, probe: Probe) -> dict[str, torch.Tensor]:
    return concept_predictions(backbone, biased, probe)


@pytest.mark.parametrize("branch", ["negative", "positive"])
def test_diffusers_takes_the_biases_of_a_peft_file(
    backbone: Backbone,
    biased: Concept,
    probe: Probe,
    predictions: dict[str, torch.Tensor],
    biased_predictions: dict[str, torch.Tensor],
    branch: str,
) -> None:
    loaded = file_prediction(backbone, write_peft(branch_adapter(biased, branch), FACTS, torch.float32), "x", probe)
    torch.testing.assert_close(loaded.prediction, biased_predictions[branch], rtol=1e-4, atol=1e-5)
    assert (biased_predictions[branch] - predictions[branch]).abs().max() > 0.01


def test_every_layer_has_a_name_in_comfyui_and_a1111_and_is_read_back_from_kohya(
    backbone: Backbone, concept: Concept
) -> None:
    layers, names = modules_of(backbone), replace(NAMES, layers_per_block=2)
    for network, named in layers.items():
        assert all(known_to_comfyui(network, name) and known_to_a1111(network, name, names) for name in named)
    adapter = branch_adapter(concept, "positive")
    again = read_kohya(
        write_kohya(adapter, FACTS, torch.float32), "x", {n: list(named) for n, named in layers.items()}, NAMES
    )
    assert again.by_layer().keys() == adapter.by_layer().keys()


def test_loading_a_file_leaves_the_base_model_as_it_is(
    backbone: Backbone, concept: Concept, probe: Probe, predictions: dict[str, torch.Tensor]
) -> None:
    file_prediction(backbone, write_kohya(branch_adapter(concept, "positive"), FACTS, torch.float32), "x", probe)
    assert torch.equal(base_prediction(backbone, probe), predictions["base"])
    assert not hasattr(backbone.unet, "peft_config")


def test_a_probe_is_the_same_every_time(backbone: Backbone) -> None:
    first, second = make_probe(backbone), make_probe(backbone)
    assert torch.equal(first.latents, second.latents) and torch.equal(first.tokens.ids, second.tokens.ids)
    assert not torch.equal(make_probe(backbone, seed=1).latents, first.latents)
