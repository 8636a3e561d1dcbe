"""SD 1.x, SD 2.x, SDXL and SDXL-v against diffusers' pipelines, and against two passes with merged weights."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dreamartist_pipeline.api import sample_latents, step_values
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone, load_outline
from dreamartist_pipeline.backbones.concepts import attach, concept_metadata, draw_latents, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.sdxl import StableDiffusionXL
from dreamartist_pipeline.backbones.prompts import PromptEncoder
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.init_picture import InitPicture
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import (
    DeviceParams,
    LossParams,
    SamplerParams,
    StrengthParams,
    TrainingParams,
)
from refusals import says
from tiny_models import BUILDERS
from two_passes import TwoPasses

Build = Callable[[str], Path]
MakeParams = Callable[..., TrainingParams]
CPU = DeviceParams(device="cpu")
XL = ("sdxl", "sdxl-v")
PROMPTS = {"positive": "a my-fox, the background", "negative": "a my-fox-neg"}
DDIM = SamplerParams(scheduler="ddim", num_inference_steps=5, guidance_scale=4.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ATTENTION, TEXT = [r"re:.*\.attn.?$"], [r"re:.*self_attn$", r"re:.*mlp$"]


def pair(layers: list[str]) -> list[dict[str, Any]]:
    return [{"lr": 1e-3, "rank": rank, "branch": b, "alpha": 2.0, "layers": layers} for b, rank in (("p", 2), ("n", 1))]


@pytest.fixture(params=BUILDERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(name: str, tiny_model: Build) -> Path:
    return tiny_model(name)


@functools.cache
def opened(folder: Path) -> Backbone:
    return load_backbone(BaseModelFiles(folder), CPU)


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return opened(folder)


@pytest.fixture
def concept(backbone: Backbone, make_training_params: MakeParams) -> Concept:
    """Return a concept of random adapters in every network, and random words."""
    groups = {f"lora_{encoder}": pair(TEXT) for encoder in backbone.tokenizers}
    params = make_training_params(lora_unet=pair(ATTENTION), **groups)
    concept = start_concept(backbone, params, 1, seed=0).snapshot(concept_metadata(backbone, params, 1))
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.2 for n, t in concept.tensors.items()}
    return Concept(tensors, concept.metadata)


@pytest.fixture
def given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)  # 2 × 2 at the lowest level
    return {"latents": latents, "noise": noise, "timesteps": torch.tensor([40, 999])}


# --------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize("name", XL)
def test_text_states_and_pooled_state_are_those_of_diffusers(folder: Path, backbone: Backbone, clip_skip: int) -> None:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    prompts = PromptEncoder(backbone, clip_skip=clip_skip)
    ours = prompts.encode(prompts.tokenize(["", "a red cat", "the yellow house, style"]))
    given = ["a red cat", "the yellow house, style"]
    positive, negative, pooled, negative_pooled = pipe.encode_prompt(given, clip_skip=clip_skip)
    torch.testing.assert_close(ours.states, torch.cat([negative[:1], positive]), **CLOSE)
    torch.testing.assert_close(ours.pooled, torch.cat([negative_pooled[:1], pooled]), **CLOSE)
    assert not (ours.states[0].any() or ours.pooled[0].any())


@pytest.mark.parametrize("name", ["sdxl"])
def test_an_empty_prompt_is_encoded_where_the_model_says_so(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = json.loads((copied / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (copied / "model_index.json").write_text(json.dumps(index))
    prompts = PromptEncoder(load_backbone(BaseModelFiles(copied), CPU))
    ours = prompts.encode(prompts.tokenize([""]))
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(copied)
    _, negative, _, negative_pooled = pipe.encode_prompt("a red cat")
    torch.testing.assert_close(ours.states, negative, **CLOSE)
    torch.testing.assert_close(ours.pooled, negative_pooled, **CLOSE)
    assert ours.states.any()


@pytest.mark.parametrize("name", ["sdxl"])
def test_weights_act_on_each_text_encoders_states_and_not_on_the_pooled_state(backbone: Backbone) -> None:
    prompts = PromptEncoder(backbone)
    tokens = prompts.tokenize(["a red cat", "a {red:1.5} cat"])
    plain, weighted = (prompts.encode(tokens[torch.tensor([row])]) for row in (0, 1))
    torch.testing.assert_close(weighted.pooled, plain.pooled, **CLOSE)
    first = slice(0, backbone.word_widths["text_encoder"])
    for columns in (first, slice(first.stop, None)):
        ratio = weighted.states[0, 2, columns] / weighted.states[0, 1, columns]  # of "red" and "a"
        expected = 1.5 * plain.states[0, 2, columns] / plain.states[0, 1, columns]
        torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl"])
def test_a_clip_skip_beyond_the_layers_that_are_read_is_refused(backbone: Backbone) -> None:
    PromptEncoder(backbone, clip_skip=1)
    with pytest.raises(InputError, check=says(expected="2 layers", got="2")):
        PromptEncoder(backbone, clip_skip=2)


@pytest.mark.parametrize("name", ["sdxl"])
@pytest.mark.parametrize(("clip_skip", "trained"), [(0, {"0", "1"}), (1, {"0"})])
def test_layers_after_the_text_states_are_not_trained_unless_the_pooled_state_reads_them(
    backbone: Backbone, make_training_params: MakeParams, clip_skip: int, trained: set[str]
) -> None:
    groups = {f"lora_{encoder}": pair(TEXT) for encoder in backbone.tokenizers}
    new = start_concept(backbone, make_training_params(lora_unet=[], clip_skip=clip_skip, **groups), 1, 0)
    of = {encoder: {n.partition("layers.")[2][0] for n in new.stacks[encoder].layers} for encoder in new.stacks}
    assert of == {"text_encoder": trained, "text_encoder_2": {"0", "1", "2"}}


# --------------------------------------------------------------------------------------------- a step


def test_prediction_loss_and_gradients_are_those_of_two_passes(
    folder: Path, backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]
) -> None:
    values = step_values(
        backbone, concept, PROMPTS["positive"], PROMPTS["negative"], **given, loss=LossParams(weighting="none")
    )
    plain = TwoPasses(folder, concept)
    combined = plain.combined(PROMPTS, 3.0, plain.noised(**given), given["timesteps"])
    row_losses = ((combined - plain.target(**given)) ** 2).mean((1, 2, 3))
    gradients = torch.autograd.grad(row_losses.mean(), list(plain.learned.values()))

    torch.testing.assert_close(values.prediction, combined.detach(), **CLOSE)
    torch.testing.assert_close(values.row_losses, row_losses.detach(), **CLOSE)
    assert values.gradients.keys() == plain.learned.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for tensor, expected in zip(plain.learned, gradients, strict=True):
        assert expected.any(), tensor
        difference = float((values.gradients[tensor] - expected).abs().max())
        assert difference <= 1e-5 * largest, f"{tensor} differs by {difference:.1e}"


@pytest.mark.parametrize("name", ["sdxl"])
def test_every_row_has_the_framing_of_its_image(
    folder: Path, backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]
) -> None:
    framing = torch.tensor([[900, 700, 0, 20, 128, 128], [128, 128, 0, 0, 128, 128]])
    ours = step_values(backbone, concept, PROMPTS["positive"], PROMPTS["negative"], **given, framing=framing).prediction
    plain = TwoPasses(folder, concept)
    expected = plain.combined(PROMPTS, 3.0, plain.noised(**given), given["timesteps"], time_ids=framing)
    torch.testing.assert_close(ours, expected.detach(), **CLOSE)
    whole = plain.combined(PROMPTS, 3.0, plain.noised(**given), given["timesteps"])
    torch.testing.assert_close(ours[1], whole[1].detach(), **CLOSE)
    assert not torch.allclose(ours[0], whole[0], atol=1e-3)


# --------------------------------------------------------------------------------------------- drawing


def pipeline_of(folder: Path, kind: str) -> Any:
    """Return a pipeline of diffusers with DDIM: "", "Img2Img" or "Inpaint"."""
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    whole = type(loaded).__name__.replace("Pipeline", f"{kind}Pipeline")
    options = {} if "XL" in whole else {"requires_safety_checker": False}
    pipe = getattr(diffusers, whole)(**loaded.components, **options)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("size_px", "negative_prompt"), [((64, 64), None), ((128, 64), "background")])
def test_the_base_model_draws_what_diffusers_draws(
    folder: Path, backbone: Backbone, size_px: tuple[int, int], negative_prompt: str | None
) -> None:
    width, height = size_px
    pipe = pipeline_of(folder, "")
    expected = pipe(
        "a red cat",
        negative_prompt=negative_prompt,
        generator=torch.Generator().manual_seed(5),
        guidance_scale=4.0,
        num_inference_steps=5,
        width=width,
        height=height,
        output_type="latent",
    ).images
    base = attach(backbone, None, StrengthParams())
    (latents,) = draw_latents(backbone, base, ["a red cat"], negative_prompt or "", [5], DDIM, size_px=size_px)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_a_picture_is_redrawn_as_by_diffusers(folder: Path, backbone: Backbone, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture, mask = Image.fromarray(pixels), Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    masked = {"mask_image": mask, "height": 64, "width": 64} if kind == "Inpaint" else {}
    expected = pipeline_of(folder, kind)(
        "a red cat",
        image=picture,
        strength=0.6,
        negative_prompt="background",
        generator=torch.Generator().manual_seed(5),
        guidance_scale=4.0,
        num_inference_steps=5,
        output_type="latent",
        **masked,
    ).images
    base = attach(backbone, None, StrengthParams())
    init = InitPicture(picture, mask if masked else None, 0.6)
    (latents,) = draw_latents(backbone, base, ["a red cat"], "background", [5], DDIM, init=init)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "negative"),
    [("sd2-v", "a my-fox-neg"), ("sdxl", "a my-fox-neg"), ("sdxl-v", "a my-fox-neg"), ("sdxl", "")],
)
def test_a_concept_draws_as_two_passes_do(folder: Path, backbone: Backbone, concept: Concept, negative: str) -> None:
    expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    latents = sample_latents(backbone, concept, PROMPTS["positive"], negative, expected, sampler=DDIM)
    plain = TwoPasses(folder, concept)
    scheduler = diffusers.DDIMScheduler.from_config(plain.pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            prompts = PROMPTS | {"negative": negative}
            combined = plain.combined(prompts, 4.0, expected, timestep.expand(1))
            expected = scheduler.step(combined, timestep, expected).prev_sample
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", XL)
def test_models_are_told_apart(backbone: Backbone) -> None:
    assert isinstance(backbone, StableDiffusionXL)
    assert backbone.word_widths == {"text_encoder": 16, "text_encoder_2": 24}
    assert backbone.image_px == 64


@pytest.mark.parametrize("name", ["sdxl"])
@pytest.mark.parametrize(
    ("file", "change", "refused"),
    [
        (
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": True},
            {"expected": "v_prediction", "got": "epsilon and rescale_betas_zero_snr"},
        ),
        ("unet/config.json", {"in_channels": 9}, {"expected": "4 input channels", "got": "9 input channels"}),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, {"got": "latents_mean", "remedy": "another base model"}),
    ],
    ids=["zero terminal SNR", "inpainting", "Playground v2.5"],
)
def test_models_of_another_kind_are_refused_by_their_configuration(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any], refused: dict[str, str]
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / file).write_text(json.dumps(json.loads((copied / file).read_text()) | change))
    with pytest.raises(InputError, check=says(**refused)):
        load_outline(BaseModelFiles(copied))
