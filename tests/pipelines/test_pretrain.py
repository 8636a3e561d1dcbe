"""The pretrain pipeline on a world of four hand-drawn sprites: from SVG to a folder that diffusers loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.datasets.sprites import CheckpointStore, PretrainedFolderDataset
from dreamartist_pipeline.interop.sprite_packages import choose_sprites, icon_svg
from dreamartist_pipeline.params import PretrainParams
from dreamartist_pipeline.pipelines.pretrain.nodes import (
    draw_samples,
    render_held_out_sprites,
    render_sprites,
    train_autoencoder,
    train_denoiser,
    train_towers,
)

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
    stage = {"num_steps": 2, "batch_size": 2, "lr": 1e-3, "matrix_lr": 1e-3, "checkpoint_every": 1, "num_scenes": 16}
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
    with pytest.raises(InputError, match="expected 'apple' .* in the sprite package 'noto'"):
        list(choose_sprites(packages, params))


def test_all_objects_are_named_by_their_labels_unless_listed_held_out_or_named_twice(packages, params):
    for emoji, label in zip(packages["emojibase-data"]["data"], ("red apple", "Box!", "fox"), strict=True):
        emoji["label"] = label
    chosen = choose_sprites(packages, params.model_copy(update={"all_objects": True}))
    assert [(word, style) for _, word, style in chosen if style == "noto"] == [("apple", "noto"), ("box", "noto")]
    packages["emojibase-data"]["data"][1]["label"] = "fox"
    chosen = choose_sprites(packages, params.model_copy(update={"all_objects": True}))
    assert [(word, style) for _, word, style in chosen if style == "noto"] == [("apple", "noto"), ("", "noto")]


def test_held_out_objects_are_rendered_apart_in_every_style(packages, params):
    held_out = render_held_out_sprites(packages, params)
    assert (held_out.objects, held_out.styles) == (("fox", "fox"), ("noto", "blob"))


def test_an_icon_keeps_its_own_view_box_over_its_collections():
    collection = {"width": 16, "height": 16, "icons": {"wide": {"body": "", "width": 32, "left": 4}}}
    assert 'viewBox="4 0 32 16"' in icon_svg(collection, "wide")


def test_sprites_are_rendered_with_their_colour_and_transparency(packages, params):
    sprites = render_sprites(packages, params)
    apple = sprites.images[sprites.objects.index("apple")]
    assert apple[:, 8, 8].tolist() == [0xD0, 0x20, 0x20, 255]
    assert apple[3, 0, 0] == 0


def test_the_whole_chain_makes_a_folder_that_stable_diffusion_loads_and_resumes_to_the_same_weights(
    packages, params, tmp_path
):
    def train(folder: str, interrupted: bool) -> dict[str, torch.Tensor]:
        store = CheckpointStore(tmp_path / folder / "checkpoints")
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                train_autoencoder(sprites, held_out, params, store, InterruptingTracker())
        autoencoder = PretrainedFolderDataset(path=str(tmp_path / folder / "autoencoder"))
        autoencoder.save(train_autoencoder(sprites, held_out, params, store, tracker))
        tokenizer, towers, model = (
            PretrainedFolderDataset(path=str(tmp_path / folder / name)) for name in ("tokenizer", "towers", "model")
        )
        for dataset, trained in zip((tokenizer, towers), train_towers(sprites, params, store, tracker), strict=True):
            dataset.save(trained)
        paths = autoencoder.load(), tokenizer.load(), towers.load()
        pipeline = train_denoiser(sprites, *paths, params, store, tracker)
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
    assert {"autoencoder/psnr_db", "towers/captions_found", "towers/loss", "denoiser/loss"} <= logged
    samples, objects = draw_samples(str(tmp_path / "whole" / "model"), params)
    assert samples.width > 8 * 16
    assert objects.height > 16  # one picture and its word
    written = "".join(path.read_text() for path in (tmp_path / "whole" / "model").rglob("*.json"))
    assert str(tmp_path) not in written
