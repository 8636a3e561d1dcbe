"""The base model: checks of its files, frozen modules, and the same images as diffusers' own pipeline."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dreamartist_pipeline.backbones.base_model import (
    Backbone,
    BaseModelFiles,
    _warn_once,
    decode_latents,
    decode_with_gradients,
    encode_images,
    load_backbone,
    load_outline,
    open_base_model,
    with_zero_terminal_snr,
)
from dreamartist_pipeline.backbones.concepts import attach, generate
from dreamartist_pipeline.backbones.schedulers import make_scheduler
from dreamartist_pipeline.core.sampling import image_generators, initial_noise
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams
from refusals import says

CPU = DeviceParams(device="cpu")


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), CPU)


@pytest.fixture
def copied_model(tiny_base_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_model, tmp_path / "copy"))


# --------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copied_model: Path, part: str) -> None:
    shutil.rmtree(copied_model / part)
    with pytest.raises(InputError, check=says(expected=str(copied_model), got=f"{part}/")):
        load_backbone(BaseModelFiles(copied_model), CPU)


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("model_index.json", "model_index.json"),
        ("unet/config.json", "unet/config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/*.safetensors"),
        ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(copied_model: Path, file: str, missing: str) -> None:
    (copied_model / file).unlink()
    with pytest.raises(InputError, check=says(expected=str(copied_model), got=missing)):
        BaseModelFiles(copied_model).check()


@pytest.mark.parametrize("load", [load_outline, lambda files: load_backbone(files, CPU)])
def test_a_model_that_takes_more_than_latents_is_refused_before_its_weights_are_read(
    copied_model: Path, load: Callable[[BaseModelFiles], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copied_model / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))
    monkeypatch.setattr(UNet2DConditionModel, "from_config", lambda *_, **__: pytest.fail("the UNet is made"))
    with pytest.raises(InputError, check=says(expected="4 input channels", got="9 input channels")):
        load(BaseModelFiles(copied_model))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"", None])
def test_truncated_weights_are_named(copied_model: Path, content: bytes | None) -> None:
    weights = copied_model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, check=says(got="Git LFS pointers: unet/diffusion_pytorch_model")):
        BaseModelFiles(copied_model).check()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, check=says(expected=str(tmp_path / "nowhere"), remedy="base_model")):
        BaseModelFiles(tmp_path / "nowhere").check()


def test_other_families_are_named(copied_model: Path) -> None:
    (copied_model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, check=says(expected="stable-diffusion-xl", got="FluxPipeline")):
        BaseModelFiles(copied_model).check()


@pytest.mark.parametrize(
    ("index", "refused"),
    [
        (
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
            {"got": "an SDXL refiner", "remedy": "hub:stabilityai/stable-diffusion-xl-base-1.0"},
        ),
        (
            {"_class_name": "StableDiffusionXLPipeline", "vae": [None, None]},
            {"expected": "text_encoder_2", "got": "none as vae"},
        ),
    ],
)
def test_a_model_without_one_of_the_parts_is_named(
    copied_model: Path, index: dict[str, Any], refused: dict[str, str]
) -> None:
    (copied_model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, check=says(**refused)):
        BaseModelFiles(copied_model).check()


def test_the_fingerprint_follows_the_weights_and_nothing_else(tiny_base_model: Path, copied_model: Path) -> None:
    fingerprint = BaseModelFiles(copied_model).fingerprint()
    assert fingerprint == BaseModelFiles(str(tiny_base_model)).fingerprint()  # wherever it lies
    assert re.fullmatch("sha256:[0-9a-f]{64}", fingerprint)
    index = copied_model / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_diffusers_version": "0.1"}))
    assert BaseModelFiles(copied_model).fingerprint() == fingerprint
    weights = copied_model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert BaseModelFiles(copied_model).fingerprint() != fingerprint


def test_earlier_versions_fingerprint_follows_all_files(tiny_base_model: Path, copied_model: Path) -> None:
    old = BaseModelFiles(copied_model).old_fingerprint()
    assert re.fullmatch("[0-9a-f]{16}", old)
    assert old == BaseModelFiles(tiny_base_model).old_fingerprint()
    index = copied_model / "model_index.json"
    index.write_text(index.read_text() + " ")
    assert BaseModelFiles(copied_model).old_fingerprint() != old


# --------------------------------------------------------------------------------------------- few steps


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[Path], list[str]]:
    """Return the warnings of opening a base model's outline, as in a process of its own."""

    def open_it(folder: Path) -> list[str]:
        _warn_once.cache_clear()
        with caplog.at_level(logging.WARNING, logger=BaseModelFiles.__module__):
            load_outline(BaseModelFiles(folder))
        return [record.getMessage() for record in caplog.records]

    return open_it


def test_a_model_of_few_steps_is_named_once(copied_model: Path, warnings_of: Callable[[Path], list[str]]) -> None:
    turbo = copied_model.rename(copied_model.with_name("sd-turbo"))
    (warning,) = warnings_of(turbo)
    assert "sd-turbo is a Turbo model" in warning
    load_outline(BaseModelFiles(turbo))
    load_backbone(BaseModelFiles(turbo), CPU)
    assert len(warnings_of(turbo)) == 2  # the second by clearing what was said


def test_a_model_is_known_by_what_it_was_saved_from(
    copied_model: Path, warnings_of: Callable[[Path], list[str]]
) -> None:
    index = copied_model / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_name_or_path": "Lykon/dreamshaper-8-lcm"}))
    assert "LCM" in warnings_of(copied_model)[0]


def test_a_unet_that_takes_a_guidance_scale_is_an_lcms(
    copied_model: Path, warnings_of: Callable[[Path], list[str]]
) -> None:
    config = copied_model / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_cond_proj_dim": 8}))
    weights = config.with_name("diffusion_pytorch_model.safetensors")
    save_file(load_file(weights) | {"time_embedding.cond_proj.weight": torch.zeros(16, 8)}, weights)
    assert "takes a guidance scale" in warnings_of(copied_model)[0]


def test_other_models_are_opened_without_a_warning(
    tiny_base_model: Path, warnings_of: Callable[[Path], list[str]]
) -> None:
    assert warnings_of(tiny_base_model) == []


# --------------------------------------------------------------------------------------------- opened once


def test_a_base_model_is_opened_once_for_a_device_and_again_when_its_files_change(copied_model: Path) -> None:
    opened = open_base_model(copied_model, CPU)
    assert open_base_model(str(copied_model), DeviceParams(device="auto")) is opened or torch.cuda.is_available()
    assert open_base_model(copied_model, DeviceParams(device="cpu", dtype="bfloat16")).dtype == torch.bfloat16
    assert open_base_model(copied_model, CPU) is opened
    weights = copied_model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    again = open_base_model(copied_model, CPU)
    assert again is not opened
    assert again.fingerprint != opened.fingerprint


@pytest.mark.parametrize("load", [load_outline, lambda files: load_backbone(files, CPU)], ids=["outline", "weights"])
def test_a_damaged_configuration_is_refused(copied_model: Path, load: Callable[[BaseModelFiles], Any]) -> None:
    (copied_model / "unet" / "config.json").write_text("{")
    with pytest.raises(InputError, check=says(expected=str(copied_model), got="config.json", remedy="base_model")):
        load(BaseModelFiles(copied_model))


def test_an_unknown_prediction_type_is_refused(copied_model: Path) -> None:
    config = copied_model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "sample"}))
    with pytest.raises(InputError, check=says(expected="v_prediction", got="'sample'")):
        load_backbone(BaseModelFiles(copied_model), CPU)


# --------------------------------------------------------------------------------------------- in memory


def test_every_part_is_loaded_frozen_and_in_eval_mode(backbone: Backbone) -> None:
    for part in (backbone.unet, backbone.autoencoder, backbone.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert backbone.objective.prediction_type == "v_prediction"
    assert (backbone.image_px, backbone.latent_scale) == (32, 4)


def test_an_outline_has_the_names_and_no_weights(tiny_base_model: Path, backbone: Backbone) -> None:
    outline = load_outline(BaseModelFiles(tiny_base_model))
    assert [name for name, _ in outline.unet.named_modules()] == [name for name, _ in backbone.unet.named_modules()]
    assert {p.device.type for p in (*outline.unet.parameters(), *outline.text_encoder.parameters())} == {"meta"}


def test_latents_are_those_of_the_autoencoder_times_its_scale(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = backbone.autoencoder.encode(image).latent_dist
        decoded = backbone.autoencoder.decode(posterior.mean).sample
    backbone.autoencoder.register_to_config(scaling_factor=0.5)
    try:
        mean, std = encode_images(backbone, image)
        torch.testing.assert_close(mean, posterior.mean / 2)
        torch.testing.assert_close(std, posterior.std / 2)
        torch.testing.assert_close(decode_latents(backbone, mean), decoded.clamp(-1, 1))
    finally:
        backbone.autoencoder.register_to_config(scaling_factor=1.0)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler", "euler_a", "unipc"])
def test_every_scheduler_keeps_the_prediction_type_and_draws_by_seed(backbone: Backbone, name: str) -> None:
    sampler = SamplerParams(scheduler=name, num_inference_steps=3)
    scheduler = make_scheduler(backbone, sampler)
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, backbone.objective.alphas_cumprod)
    base = attach(backbone, None, StrengthParams())
    first, again, other = (generate(backbone, base, ["a red cat"], "", [seed], sampler)[0] for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_the_base_model_draws_what_diffusers_draws(tiny_base_model: Path, backbone: Backbone) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_model, safety_checker=None, feature_extractor=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    prompts, seeds = ["a red cat", "a blue dog"], [5, 6]
    expected = pipeline(
        prompts,
        negative_prompt=["background"] * 2,
        latents=initial_noise((4, 8, 8), image_generators(seeds)),
        guidance_scale=4.0,
        num_inference_steps=4,
        output_type="np",
    ).images
    sampler = SamplerParams(scheduler="ddim", num_inference_steps=4, guidance_scale=4.0)
    images = generate(backbone, attach(backbone, None, StrengthParams()), prompts, "background", seeds, sampler)
    ours = np.stack([np.asarray(image) for image in images]) / 255
    assert np.abs(ours - expected).max() <= 1 / 255  # rounding to 8 bits


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler", "euler_a", "unipc"])
def test_every_scheduler_samples_the_zero_terminal_schedule_from_its_last_timestep(
    backbone: Backbone, name: str
) -> None:
    rescaled = with_zero_terminal_snr(backbone)
    assert rescaled.unet is backbone.unet
    assert rescaled.objective.snr(torch.tensor([999])).item() == 0
    sampler = SamplerParams(scheduler=name, num_inference_steps=3)
    scheduler = make_scheduler(rescaled, sampler)
    # diffusers goes through β and, for some, puts 2⁻²⁴ in place of the last 0
    torch.testing.assert_close(scheduler.alphas_cumprod, rescaled.objective.alphas_cumprod, atol=2e-5, rtol=0)
    scheduler.set_timesteps(3)
    assert round(float(scheduler.timesteps[0])) == 999
    base = attach(backbone, None, StrengthParams())
    altered = attach(rescaled, None, StrengthParams())
    images = [generate(backbone, loaded, ["a red cat"], "", [1], sampler)[0] for loaded in (base, altered)]
    assert images[0].tobytes() != images[1].tobytes()


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler", "euler_a", "unipc"])
def test_the_schedule_is_rescaled_for_a_base_model_whose_config_lacks_the_options(
    tiny_base_model: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(tiny_base_model, tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    options = ("rescale_betas_zero_snr", "timestep_spacing")
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in options}))
    rescaled = with_zero_terminal_snr(load_backbone(BaseModelFiles(tmp_path / "model"), DeviceParams(device="cpu")))
    scheduler = make_scheduler(rescaled, SamplerParams(scheduler=name, num_inference_steps=3))
    scheduler.set_timesteps(3)
    assert round(float(scheduler.timesteps[0])) == 999
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6


def test_a_rescaled_schedule_rescaled_again_stays(backbone: Backbone) -> None:
    once = with_zero_terminal_snr(backbone)
    twice = with_zero_terminal_snr(once)
    torch.testing.assert_close(twice.objective.alphas_cumprod, once.objective.alphas_cumprod)


def test_decoding_lets_gradients_through_to_the_latents_only(backbone: Backbone) -> None:
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    decode_with_gradients(backbone, latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.autoencoder.parameters())
