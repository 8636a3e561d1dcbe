"""Generation of prompts × seeds, from noise or a picture: comparison with diffusers, and settings in the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dreamartist_pipeline.backbones import concepts, drawing
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, encode_images, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, draw_latents, generate
from dreamartist_pipeline.backbones.drawing import DrawingRequest, draw
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.images import to_tensor
from dreamartist_pipeline.core.init_picture import InitPicture, init_picture
from dreamartist_pipeline.core.sampling import image_generators, initial_noise
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams
from refusals import says

PROMPTS, SEEDS = ["a red cat", "a blue dog"], [5, 6]
NUM_STEPS = 6  # of schedulers of up to four orders; two of them at a denoise of 0.35
SAMPLER = SamplerParams(scheduler="ddim", num_inference_steps=4, guidance_scale=4.0, batch_size=3)
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "HeunDiscreteScheduler": ("HeunDiscreteScheduler", {}),
    "LMSDiscreteScheduler": ("LMSDiscreteScheduler", {}),
    "PNDMScheduler": ("PNDMScheduler", {}),
    "DDPMScheduler": ("DDPMScheduler", {}),
    "KDPM2DiscreteScheduler": ("KDPM2DiscreteScheduler", {}),
}


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """White on the right, with a soft edge at x = 15."""
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[:, 15], pixels[:, 16:] = 120, 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def plain(tiny_base_model: Path) -> dict[str, Any]:
    """Return diffusers' pipelines over the same weights."""
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    img2img = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tiny_base_model, **options)
    inpaint = diffusers.StableDiffusionInpaintPipeline(**img2img.components, requires_safety_checker=False)
    for pipeline in (img2img, inpaint):
        pipeline.set_progress_bar_config(disable=True)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tiny_base_model, subfolder="scheduler")
    return {"img2img": img2img, "inpaint": inpaint, "scheduler_config": scheduler.config}


def one_by_one(plain: dict[str, Any], kind_of_pipeline: str, name: str, **arguments: Any) -> torch.Tensor:
    """Return the latents that a pipeline of diffusers draws, an image at a time."""
    kind, options = SCHEDULERS[name]
    pipeline = plain[kind_of_pipeline]
    rows = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        pipeline.scheduler = getattr(diffusers, kind).from_config(plain["scheduler_config"], **options)
        drawn = pipeline(
            prompt,
            negative_prompt="background",
            generator=torch.Generator().manual_seed(seed),
            guidance_scale=4.0,
            num_inference_steps=NUM_STEPS,
            output_type="latent",
            **arguments,
        )
        rows.append(drawn.images)
    return torch.cat(rows)


def ours(backbone: Backbone, name: str, init: InitPicture) -> torch.Tensor:
    sampler = SamplerParams(scheduler=name, num_inference_steps=NUM_STEPS, guidance_scale=4.0)
    base = attach(backbone, None, StrengthParams())
    return torch.cat(list(draw_latents(backbone, base, PROMPTS, "background", SEEDS, sampler, init=init)))


# -------------------------------------------------------------------------------------------- comparison with diffusers


@pytest.mark.parametrize("denoise", [0.35, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_gives_the_latents_of_diffusers_img2img(
    backbone: Backbone, plain: dict[str, Any], picture: Image.Image, name: str, denoise: float
) -> None:
    expected = one_by_one(plain, "img2img", name, image=picture, strength=denoise)
    latents = ours(backbone, name, InitPicture(picture, None, denoise))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("denoise", [0.6, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_masked_picture_gives_the_latents_of_diffusers_inpainting(
    backbone: Backbone, plain: dict[str, Any], picture: Image.Image, mask: Image.Image, name: str, denoise: float
) -> None:
    expected = one_by_one(plain, "inpaint", name, image=picture, mask_image=mask, strength=denoise, height=32, width=32)
    latents = ours(backbone, name, InitPicture(picture, mask, denoise))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def test_what_the_mask_keeps_is_the_picture(backbone: Backbone, picture: Image.Image, mask: Image.Image) -> None:
    mean, std = encode_images(backbone, to_tensor([picture]))
    sampled = mean + std * initial_noise(mean.shape[1:], image_generators(SEEDS))  # each generator's first draw
    latents = ours(backbone, "ddim", InitPicture(picture, mask, 1.0))
    torch.testing.assert_close(latents[..., :4], sampled[..., :4])  # the left half, of 8
    assert not torch.isclose(latents[..., 4:], sampled[..., 4:], atol=1e-3).all(dim=(1, 2)).any()


def test_a_picture_is_encoded_once_and_sampled_for_every_image(
    backbone: Backbone, picture: Image.Image, mask: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, init = attach(backbone, None, StrengthParams()), InitPicture(picture, mask, 0.5)
    singly = SAMPLER.model_copy(update={"batch_size": 1})
    apart = [generate(backbone, base, [p], "", [s], singly, init=init)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    encodings: list[torch.Size] = []

    def counted(backbone: Backbone, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encodings.append(images.shape)
        return encode_images(backbone, images)

    monkeypatch.setattr(concepts, "encode_images", counted)
    together = generate(backbone, base, PROMPTS, "", SEEDS, singly, init=init)
    assert encodings == [(1, 3, 32, 32)]
    assert [image.tobytes() for image in together] == [image.tobytes() for image in apart]


# --------------------------------------------------------------------------------------------- sizes


def test_a_size_is_drawn_as_diffusers_draws_it(tiny_base_model: Path, backbone: Backbone) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_base_model, safety_checker=None, feature_extractor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS[0],
        generator=torch.Generator().manual_seed(5),
        guidance_scale=4.0,
        num_inference_steps=4,
        width=48,
        height=24,
        output_type="latent",
    ).images
    base = attach(backbone, None, StrengthParams())
    (latents,) = draw_latents(backbone, base, PROMPTS[:1], "", [5], SAMPLER, size_px=(48, 24))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    assert generate(backbone, base, PROMPTS[:1], "", [5], SAMPLER, size_px=(48, 24))[0].size == (48, 24)


def test_sides_that_the_autoencoder_cannot_make_are_refused(backbone: Backbone) -> None:
    base = attach(backbone, None, StrengthParams())
    with pytest.raises(InputError, check=says(expected="4 px", got="32 × 30 px")):
        generate(backbone, base, PROMPTS[:1], "", [5], SAMPLER, size_px=(32, 30))


def request(**changes: Any) -> DrawingRequest:
    values: dict[str, Any] = {
        "prompts": PROMPTS,
        "negative_prompt": "blurry",
        "seeds": SEEDS,
        "sampler": SAMPLER,
        "strength": StrengthParams(),
    }
    return DrawingRequest(**{**values, **changes})


def test_without_a_size_the_proportions_are_the_pictures(backbone: Backbone, picture: Image.Image) -> None:
    wide = init_picture(picture.resize((400, 100)), None, None, 4)
    assert [image.size for image in draw(backbone, None, request(init=wide)).images] == [(64, 16)] * 4
    assert [image.size for image in draw(backbone, None, request()).images] == [(32, 32)] * 4
    sized = draw(backbone, None, request(init=wide, size_px=(24, 40)))
    assert [image.size for image in sized.images] == [(24, 40)] * 4


# --------------------------------------------------------------------------------------------- prompts, seeds, info


def test_images_are_ordered_by_prompt_and_depend_on_their_own_seed_only(backbone: Backbone) -> None:
    drawn = draw(backbone, None, request())
    settings = [json.loads(image.info["dreamartist"]) for image in drawn.images]
    assert [(s["prompt"], s["seed"]) for s in settings] == [
        ("a red cat", 5),
        ("a red cat", 6),
        ("a blue dog", 5),
        ("a blue dog", 6),
    ]
    (alone,) = draw(backbone, None, request(prompts=PROMPTS[1:], seeds=[6])).images
    assert alone.tobytes() == drawn.images[3].tobytes()


def test_the_settings_of_an_image_have_the_picture_it_started_from(
    backbone: Backbone, picture: Image.Image, mask: Image.Image
) -> None:
    masked = InitPicture(picture, mask, 0.5)
    (image,) = draw(backbone, None, request(prompts=PROMPTS[:1], seeds=[5], init=masked)).images
    settings = json.loads(image.info["dreamartist"])
    assert (settings["denoise"], settings["init_image"]["size_px"], settings["size_px"]) == (0.5, [32, 32], [32, 32])
    assert settings["init_image"]["sha256"] != settings["init_mask"]["sha256"]
    assert image.info["parameters"].endswith("Size: 32x32, Model: tiny, Denoising strength: 0.5")


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": list(np.arange(2))},
        {"sampler": SamplerParams(scheduler="SASolverScheduler", scheduler_options={"tau_func": lambda _: 0.0})},
    ],
)
def test_settings_that_are_not_json_are_refused_before_an_image_is_generated(
    backbone: Backbone, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "generate", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(InputError, check=says(expected="JSON", remedy="scheduler_options")):
        draw(backbone, None, request(**changes))


def test_scheduler_and_its_options_are_in_the_settings(backbone: Backbone) -> None:
    options = {"use_karras_sigmas": True}
    sampler = SamplerParams(scheduler="HeunDiscreteScheduler", scheduler_options=options, num_inference_steps=3)
    (image,) = draw(backbone, None, request(prompts=PROMPTS[:1], seeds=[5], sampler=sampler)).images
    assert json.loads(image.info["dreamartist"])["sampler"] == {
        "scheduler": "HeunDiscreteScheduler",
        "scheduler_options": options,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
    }
    plain = sampler.model_copy(update={"scheduler_options": {}})
    (other,) = draw(backbone, None, request(prompts=PROMPTS[:1], seeds=[5], sampler=plain)).images
    assert image.tobytes() != other.tobytes()
