"""Files as diffusers' training scripts write them act here as in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.layouts import layout_of
from dreamartist_pipeline.backbones.lora_files import base_prediction, concept_predictions, file_prediction, make_probe
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.interop.branch_adapters import build_concept
from dreamartist_pipeline.interop.foreign_lora import ForeignLoRA, read_lora
from dreamartist_pipeline.params import DeviceParams

UNET_LAYERS, TEXT_LAYERS = ["to_k", "to_q", "to_v", "to_out.0"], ["q_proj", "k_proj", "v_proj", "out_proj"]
ALL_LAYERS = [*UNET_LAYERS, "ff.net.0.proj", "ff.net.2", "conv1"]
Script = Callable[..., tuple[bytes, torch.Tensor]]


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))


@pytest.fixture
def script(backbone: Backbone, tmp_path: Path) -> Script:
    """Save a LoRA as train_dreambooth_lora.py does, and predict with it before it is saved."""

    def run(metadata: bool = True, unet_layers: list[str] = UNET_LAYERS, **options: Any) -> tuple[bytes, torch.Tensor]:
        own = backbone.share_weights()
        config = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, **options}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            own.unet.add_adapter(LoraConfig(target_modules=unet_layers, **config))
            own.text_encoder.add_adapter(LoraConfig(target_modules=TEXT_LAYERS, **config))
        networks = {"unet": own.unet, "text_encoder": own.text_encoder}
        states = {
            f"{name}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
            for name, module in networks.items()
        }
        described = _collate_lora_metadata(networks) if metadata else {}
        StableDiffusionPipeline.save_lora_weights(tmp_path, **states, **described)
        file = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
        return file, base_prediction(own, make_probe(backbone))

    return run


def read(backbone: Backbone, file: bytes) -> ForeignLoRA:
    layout = layout_of(backbone)
    return read_lora(file, "x.safetensors", layout.shapes, layout.names)


def predicted(backbone: Backbone, lora: ForeignLoRA) -> torch.Tensor:
    concept = build_concept({SHARED: lora.adapter}, (), backbone.identity)
    return concept_predictions(backbone, concept, make_probe(backbone))["positive"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"to_q": 2, "attn1.to_v": 32, "q_proj": 1}},
        {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_k": 5}},
        {"use_rslora": True, "alpha_pattern": {"to_out.0": 4}},
        {"unet_layers": ALL_LAYERS},
    ],
    ids=["plain", "rslora", "alpha_pattern", "rank_pattern", "both", "mixed-spelling"],
)
def test_a_file_of_the_training_scripts_acts_as_it_was_trained(
    backbone: Backbone, script: Script, options: dict[str, Any]
) -> None:
    file, expected = script(**options)
    lora = read(backbone, file)
    assert lora.form in ("diffusers", "peft")
    torch.testing.assert_close(predicted(backbone, lora), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base_prediction(backbone, make_probe(backbone))).abs().max() > 0.1


def test_without_metadata_the_scale_is_1_as_diffusers_takes_it(backbone: Backbone, script: Script) -> None:
    file, _ = script(metadata=False)
    expected = file_prediction(backbone, file, "x", make_probe(backbone)).prediction
    torch.testing.assert_close(predicted(backbone, read(backbone, file)), expected, rtol=1e-4, atol=1e-5)
