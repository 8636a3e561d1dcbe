"""The layers that each tool finds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dreamartist_pipeline.backbones.families.sd import V1_NAMES
from dreamartist_pipeline.backbones.families.sdxl import XL_NAMES
from dreamartist_pipeline.interop.layer_names import (
    diffusers_loses_layers,
    known_to_a1111,
    known_to_comfyui,
    known_to_comfyui_as_peft,
)

V1, XL = (replace(names, layers_per_block=2) for names in (V1_NAMES, XL_NAMES))
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "encoder.layers.3"


@pytest.mark.parametrize(
    "layer",
    [
        *(f"{BLOCK}.{name}" for name in ("attn1.to_q", "attn2.to_k", "attn1.to_v", "attn2.to_out.0", "ff.net.0.proj")),
        *("mid_block.attentions.0.proj_in", "up_blocks.0.resnets.2.conv2", "mid_block.resnets.1.time_emb_proj"),
        *("up_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"),
        *("conv_in", "conv_out", "time_embedding.linear_2", f"{BLOCK}.ff.net.2", "mid_block.attentions.0.proj_out"),
    ],
)
def test_comfyui_and_a1111_know_stable_diffusions_unet_layers(layer: str) -> None:
    assert known_to_comfyui("unet", layer)
    assert known_to_a1111("unet", layer, V1)
    assert not known_to_a1111("unet", layer, replace(V1, layers_per_block=1))  # it would number the blocks otherwise


def test_the_original_names_of_sdxls_files_are_never_renumbered() -> None:
    assert known_to_a1111("unet", "up_blocks.0.upsamplers.0.conv", XL)
    assert known_to_a1111("unet", "up_blocks.0.upsamplers.0.conv", replace(XL, layers_per_block=1))


@pytest.mark.parametrize("layer", ["class_embedding", f"{BLOCK}.attn1.add_k_proj", "encoder_hid_proj", f"x.{BLOCK}"])
def test_neither_knows_others(layer: str) -> None:
    assert not known_to_comfyui("unet", layer)
    assert not known_to_a1111("unet", layer, V1)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"])
def test_both_know_the_text_encoders_layers(name: str) -> None:
    for layer in (f"{TEXT}.{name}", f"text_model.{TEXT}.{name}"):
        assert known_to_comfyui("text_encoder", layer)
        assert known_to_a1111("text_encoder", layer, replace(V1, layers_per_block=1))
    assert not known_to_comfyui("text_encoder", "text_projection")


def test_comfyui_drops_the_unets_attention_of_peft_files() -> None:
    assert not known_to_comfyui_as_peft("unet", f"{BLOCK}.attn1.to_q")
    assert not known_to_comfyui_as_peft("unet", f"{BLOCK}.attn2.to_out.0")
    assert known_to_comfyui_as_peft("unet", f"{BLOCK}.ff.net.2")
    assert known_to_comfyui_as_peft("text_encoder", f"{TEXT}.self_attn.q_proj")


@pytest.mark.parametrize(
    ("names", "kohya", "peft"),
    [
        ([], False, False),
        (["self_attn.q_proj", "self_attn.out_proj"], False, False),
        (["self_attn.q_proj", "self_attn.v_proj"], True, False),
        (["self_attn.q_proj", "mlp.fc1"], True, False),
        (["mlp.fc1"], False, True),
    ],
)
def test_diffusers_loses_some_text_encoder_layers_in_one_format_but_never_in_both(
    names: list[str], kohya: bool, peft: bool
) -> None:
    layers = [f"{TEXT}.{name}" for name in names]
    assert (diffusers_loses_layers("kohya", layers), diffusers_loses_layers("peft", layers)) == (kohya, peft)
