"""The JSON files of base models: values out of bounds, classes of others, and weights that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone, load_outline
from dreamartist_pipeline.backbones.holding.configurations import check_config, num_blocks
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams
from dreamartist_pipeline.schedulers import OTHER_SCHEDULES
from refusals import says


@pytest.fixture
def folder(tiny_base_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_model, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, **parts: str) -> None:
    """Check that the model is refused without its weights."""
    with pytest.raises(InputError, check=says(**parts)):
        load_outline(BaseModelFiles(folder))


@pytest.mark.parametrize(
    ("part", "changes", "got"),
    [
        ("unet", {"sample_size": None}, "sample_size"),
        ("unet", {"block_out_channels": []}, "block_out_channels"),
        ("unet", {"block_out_channels": [2**31]}, "block_out_channels.0"),
        ("unet", {"layers_per_block": -1}, "layers_per_block"),
        ("unet", {"quantization_config": {"load_in_4bit": True}}, "quantized"),
        ("vae", {"scaling_factor": 0}, "scaling_factor"),
        ("vae", {"latent_channels": "4"}, "latent_channels"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder", {"max_position_embeddings": 0}, "max_position_embeddings"),
        ("text_encoder", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
        ("text_encoder", {"attn_implementation": "evil/kernel@main"}, "attn_implementation"),
    ],
)
def test_a_configuration_out_of_bounds_is_named(folder: Path, part: str, changes: dict[str, Any], got: str) -> None:
    edit(folder / part / "config.json", **changes)
    refused(folder, expected=f"{part}/config.json", got=got)


@pytest.mark.parametrize(
    ("part", "changes", "got"),
    [
        ("unet", {"norm_num_groups": 7}, "ValueError"),
        ("unet", {"down_block_types": ["NoBlock2D", "NoBlock2D"]}, "NoBlock2D"),
        ("text_encoder", {"num_attention_heads": 5}, "ValueError"),
    ],
)
def test_what_a_library_rejects_is_named(folder: Path, part: str, changes: dict[str, Any], got: str) -> None:
    edit(folder / part / "config.json", **changes)
    refused(folder, expected=f"configuration for {part} of {folder}", got=got)


def test_a_configuration_for_more_weights_than_there_are_is_refused(folder: Path) -> None:
    edit(folder / "text_encoder" / "config.json", num_hidden_layers=3)
    refused(folder, expected="text_encoder", got="no encoder.layers.2")
    edit(folder / "text_encoder" / "config.json", num_hidden_layers=200)
    refused(folder, expected="text_encoder", got="tensors for at least 200 blocks")


def test_weights_of_other_shapes_are_named(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor[:1].clone() for name, tensor in load_file(file).items()}, file)
    refused(folder, expected="vae", got="in place of")


def test_weights_that_half_precision_cannot_hold_are_named(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = 1e30
    save_file(weights, file)
    half = DeviceParams(device="cpu", dtype="float16")
    with pytest.raises(InputError, check=says(expected="finite", got="in float16: conv_in.bias", remedy="float32")):
        load_backbone(BaseModelFiles(folder), half)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"unet": None}, "unet: "),
        ({"unet": "x"}, "unet: "),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny of diffusers"),
        ({"vae": ["evil", "AutoencoderKL"]}, "AutoencoderKL of evil"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
        ({"scheduler": ["diffusers", "MyScheduler"]}, "MyScheduler"),
        ({"scheduler": ["diffusers", "EDMEulerScheduler"]}, "EDMEulerScheduler, which has a noise schedule of its own"),
        ({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "flow-matching"),
    ],
)
def test_a_class_that_is_not_read_is_named(folder: Path, changes: dict[str, Any], got: str) -> None:
    edit(folder / "model_index.json", **changes)
    refused(folder, expected=str(folder), got=got)


@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "MyScheduler"])
def test_a_scheduler_of_another_noise_schedule_is_named_by_its_own_file(folder: Path, name: str) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    refused(folder, got=name)


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "FlaxDDIMScheduler", "LCMScheduler", "PNDMScheduler"])
def test_schedulers_of_the_same_noise_schedule_are_read(folder: Path, name: str) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    assert load_outline(BaseModelFiles(folder)).objective.prediction_type == "v_prediction"
    assert not any(name in classes for classes in OTHER_SCHEDULES.values())


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"beta_start": float("nan")}, "beta_start"),
        ({"beta_schedule": "cubic"}, "cubic"),
    ],
)
def test_a_noise_schedule_out_of_bounds_is_named(folder: Path, changes: dict[str, Any], got: str) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    refused(folder, got=got)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", "{}"),
        ("merges.txt", "a b c d"),
        ("tokenizer_config.json", "null"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"999999999": {"content": "x"}}}'),
        ("added_tokens.json", '{"x": -1}'),
    ],
)
def test_a_damaged_tokenizer_is_named(folder: Path, file: str, text: str) -> None:
    (folder / "tokenizer" / file).write_text(text)
    refused(folder, expected=str(folder))


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    file = folder / "tokenizer" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps({**vocabulary, "more</w>": len(vocabulary)}))
    refused(folder, expected="an embedding in text_encoder", got=f"{len(vocabulary)} embeddings")


def test_a_link_within_the_model_is_followed(folder: Path) -> None:
    file = folder / "vae" / "config.json"
    file.rename(folder / "vae.json")
    file.symlink_to("../vae.json")
    load_outline(BaseModelFiles(folder))


def test_published_configurations_are_within_bounds() -> None:
    from dreamartist_pipeline.backbones.holding.single_file import shipped_configs

    for name in ("sd1", "sd2-base", "sd2-v", "sdxl"):
        for file in shipped_configs(name).rglob("*config.json"):
            check_config(file.parent.name, json.loads(file.read_text()), str(file))
    sdxl = json.loads((shipped_configs("sdxl") / "unet" / "config.json").read_text())
    assert num_blocks("unet", sdxl) == 3 * 2 * 10
