"""The pretrain pipeline on a world of four hand-drawn sprites: from SVG to a folder that diffusers loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from pydantic import ValidationError

from dreamartist_pipeline.embedded.datasets import PretrainedFolderDataset
from dreamartist_pipeline.embedded.model import build_autoencoder, build_text_encoder, build_tokenizer, build_unet
from dreamartist_pipeline.embedded.sprites import choose_sprites, icon_svg
from dreamartist_pipeline.embedded.stages import DenoiserParts, assemble_untrained
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PretrainParams
from dreamartist_pipeline.pipelines.pretrain.nodes import (
    build_vocabulary,
    draw_samples,
    render_held_out_sprites,
    render_sprites,
    train_autoencoder,
    train_denoiser,
    train_towers,
)
from refusals import says

CIRCLE = '<circle cx="8" cy="8" r="7" fill="#d02020"/>'
SQUARE = '<rect x="2" y="2" width="12" height="12" fill="#2040d0"/>'


class RecordingTracker:
    def __init__(self) -> None:
        self.metrics: list[tuple[dict[str, float], int]] = []
        self.images: list[tuple[str, int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((metrics, step))

    def log_image(self, image: Any, key: str, step: int) -> None:
        self.images.append((key, step))


@pytest.fixture
def packages() -> dict[str, Any]:
    icons = {"icons": {"apple": {"body": CIRCLE}, "box": {"body": SQUARE}, "fox": {"body": SQUARE}}, "width": 16}
    chars = {"1f34e": "apple", "1f4e6": "box", "1f98a": "fox"}
    emoji = [{"hexcode": code.upper(), "group": 3} for code in chars]
    return {
        "emojibase-data": {"data": emoji},
        "noto": {"icons": icons, "chars": chars},
        "noto-v1": {"icons": icons},
        "extra": {"icons": icons, "chars": chars},
    }


@pytest.fixture
def params() -> PretrainParams:
    stage = {
        "num_steps": 2,
        "batch_size": 2,
        "lr": 1e-3,
        "matrix_lr": 1e-3,
        "checkpoint_minutes": 0.0,
        "num_scenes": 16,
    }
    size = {
        "image_px": 16,
        "latent_channels": 4,
        "autoencoder_channels": [8, 8],
        "unet_channels": [16, 16],
        "unet_attention": [False, True],
        "text_width": 32,
        "text_layers": 1,
        "vision_width": 32,
        "vision_layers": 1,
    }
    return PretrainParams(
        num_processes=1,
        sprite_px=16,
        size=size,
        styles={"noto": "noto", "noto-v1": "blob"},
        autoencoder_only_packages=["extra"],
        objects={"apple": "1f34e"},
        held_out_objects={"fox": "1f98a"},
        checkpoints="checkpoints",
        autoencoder=stage,
        towers=stage,
        denoiser=stage,
    )


def test_only_named_objects_in_named_styles_get_a_word(packages, params):
    chosen = [(word, style) for _, word, style in choose_sprites(packages, params)]
    assert chosen == [("apple", "noto"), ("", "noto"), ("apple", "blob"), ("", "blob"), ("", ""), ("", "")]


def test_a_held_out_object_is_in_no_sprite(packages, params):
    allowed = params.model_copy(update={"held_out_objects": {}})
    assert len(list(choose_sprites(packages, allowed))) - len(list(choose_sprites(packages, params))) == 3


def test_an_object_that_a_style_lacks_is_an_error(packages, params):
    packages["noto"]["chars"].pop("1f34e")
    with pytest.raises(InputError, check=says(expected="'apple' (1f34e) in the sprite package 'noto'")):
        list(choose_sprites(packages, params))


def published(packages: dict[str, Any], params: PretrainParams, labels: list[str], **rule: Any) -> list[str]:
    """Return the words of the sprites in the style `noto` when the drawings have these published names."""
    for emoji, label in zip(packages["emojibase-data"]["data"], labels, strict=True):
        emoji["label"] = label
    params = PretrainParams.model_validate(params.model_dump() | {"published_objects": {"min_styles": 2} | rule})
    return [word for _, word, style in choose_sprites(packages, params) if style == "noto"]


def test_published_objects_have_their_published_names_in_plain_letters(packages, params):
    assert published(packages, params, ["red apple", "Woman’s Boxé!", "fox"]) == ["apple", "womans boxe"]


def test_ambiguous_held_out_and_listed_names_are_skipped(packages, params):
    for label in ("apple", "fox", "red apple"):
        assert published(packages, params, ["red apple", label, "face"]) == ["apple", ""]


def test_published_objects_need_enough_styles_and_a_short_name(packages, params):
    assert published(packages, params, ["red apple", "a big old box", "fox"]) == ["apple", ""]
    assert published(packages, params, ["red apple", "a big old box", "fox"], max_words=4) == ["apple", "a big old box"]
    assert published(packages, params, ["red apple", "box", "fox"], min_styles=3) == ["apple", ""]


def test_look_alikes_are_merged(packages, params):
    packages["emojibase-data"]["data"].append({"hexcode": "1F4E7", "group": 3})
    packages["noto"]["icons"]["icons"]["box two"] = {"body": SQUARE}
    packages["noto"]["chars"]["1f4e7"] = "box two"
    packages["noto-v1"]["icons"] = {"icons": {"apple": {"body": CIRCLE}, "box two": {"body": SQUARE}}}
    labels, alike = ["red apple", "box", "fox", "crate"], {"look_alikes": {"chest": ["box", "crate"]}}
    assert published(packages, params, labels, **alike) == ["apple", "", "chest"]  # both styles draw the crate
    assert published(packages, params, labels, **alike, left_out=["crate"]) == ["apple", "", ""]
    assert published(packages, params, labels, **alike, left_out=["crate"], min_styles=1) == ["apple", "chest", ""]


def test_a_listed_name_that_nobody_published_is_an_error(packages, params):
    with pytest.raises(InputError, check=says(expected="pretrain.published_objects", got="'bax'")):
        published(packages, params, ["red apple", "box", "fox"], left_out=["bax"])


def test_held_out_objects_are_rendered_separately_in_every_style(packages, params):
    held_out = render_held_out_sprites(packages, params)
    assert (held_out.objects, held_out.styles) == (("fox", "fox"), ("noto", "blob"))


def test_an_icon_overrides_the_view_box_of_its_collection():
    collection = {"width": 16, "height": 16, "icons": {"wide": {"body": "", "width": 32, "left": 4}}}
    assert 'viewBox="4 0 32 16"' in icon_svg(collection, "wide")


def test_sprites_are_rendered_with_their_colour_and_transparency(packages, params):
    sprites = render_sprites(packages, params)
    apple = sprites.images[sprites.objects.index("apple")]
    assert apple[:, 8, 8].tolist() == [0xD0, 0x20, 0x20, 255]
    assert apple[3, 0, 0] == 0


def test_the_pipeline_saves_a_model_that_stable_diffusion_loads_and_resumes_to_the_same_weights(
    packages, params, tmp_path
):
    def train(folder: str, interrupted: bool) -> dict[str, torch.Tensor]:
        here = params.model_copy(update={"checkpoints": str(tmp_path / folder / "checkpoints")})
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                train_autoencoder(sprites, held_out, None, here, InterruptingTracker())
        autoencoder = PretrainedFolderDataset(path=str(tmp_path / folder / "autoencoder"))
        autoencoder.save(train_autoencoder(sprites, held_out, None, here, tracker))
        tokenizer, towers, model = (
            PretrainedFolderDataset(path=str(tmp_path / folder / name)) for name in ("tokenizer", "towers", "model")
        )
        tokenizer.save(build_vocabulary(sprites, params))
        towers.save(train_towers(sprites, tokenizer.load(), here, tracker))
        paths = autoencoder.load(), tokenizer.load(), towers.load()
        pipeline = train_denoiser(sprites, *paths, None, here, tracker)
        model.save(pipeline)
        return {**pipeline.unet.state_dict(), **{f"vae.{k}": v for k, v in pipeline.vae.state_dict().items()}}

    class InterruptingTracker(RecordingTracker):
        def log_image(self, image: Any, key: str, step: int) -> None:
            raise KeyboardInterrupt

    sprites, held_out = render_sprites(packages, params), render_held_out_sprites(packages, params)
    tracker = RecordingTracker()
    whole, resumed = train("whole", interrupted=False), train("resumed", interrupted=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert ("samples", 2) in tracker.images
    logged = {name for metrics, _ in tracker.metrics for name in metrics}
    assert {
        "autoencoder/psnr_db",
        "towers/captions_found",
        "towers/loss",
        "denoiser/loss",
        "denoiser/caption_gap",
    } <= logged
    samples, objects = draw_samples(str(tmp_path / "whole" / "model"), params)
    assert samples.width > 8 * 16
    assert objects.height > 16  # one picture and its word
    written = "".join(path.read_text() for path in (tmp_path / "whole" / "model").rglob("*.json"))
    assert str(tmp_path) not in written


def test_a_base_model_is_continued_with_a_larger_vocabulary_and_its_own_autoencoder(packages, params, tmp_path):
    known = build_tokenizer(["a red apple, noto style"] * 4, tmp_path / "known", params.size.max_tokens)
    larger = build_tokenizer(["a red apple, noto style", "a zebra"] * 4, tmp_path / "larger", params.size.max_tokens)
    start = StableDiffusionPipeline(
        vae=build_autoencoder(params.size),
        text_encoder=build_text_encoder(params.size, known),
        tokenizer=known,
        unet=build_unet(params.size),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    start.save_pretrained(tmp_path / "start")
    keeping = params.model_copy(update={"keep_autoencoder": True, "start": "given"})
    kept = train_autoencoder(None, None, str(tmp_path / "start"), keeping, RecordingTracker())
    kept.save_pretrained(tmp_path / "kept")

    parts = DenoiserParts(str(tmp_path / "kept"), "", str(tmp_path / "larger"), str(tmp_path / "start"))
    begun = assemble_untrained(parts, params)

    for old, new in ((start.vae, begun.vae), (start.unet, begun.unet)):
        assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    old, new = (model.text_encoder.get_input_embeddings().weight for model in (start, begun))
    shared = known.get_vocab().keys() & larger.get_vocab().keys()
    assert {"apple</w>", "style</w>"} <= shared
    assert all(torch.equal(old[known.get_vocab()[t]], new[larger.get_vocab()[t]]) for t in shared)
    fresh = new[larger.get_vocab()["zebra</w>"]].std().item()
    assert fresh == pytest.approx(old.std().item(), rel=0.5)


def test_options_that_continue_a_model_need_a_start(params):
    for option in ("keep_autoencoder", "continue_denoiser"):
        with pytest.raises(ValidationError, match="continue_denoiser need start"):
            PretrainParams.model_validate(params.model_dump() | {option: True})
