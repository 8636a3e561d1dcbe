"""Evaluators: what they return, and what they say when they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from dreamartist_pipeline.backbones.evaluators import Evaluator, load_evaluator
from dreamartist_pipeline.core.errors import InputError


@pytest.fixture(scope="module")
def efficientnet() -> Evaluator:
    return load_evaluator("efficientnet-lite0")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config={**tower, "vocab_size": 99}, vision_config=vision, projection_dim=24)
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-dinov2"
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def _ball(color: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((10, 10, 54, 54), fill=color)
    return image


def _ladder() -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.line((20, 2, 20, 62), fill="brown", width=4)
    draw.line((44, 2, 44, 62), fill="brown", width=4)
    for y in range(8, 62, 10):
        draw.line((20, y, 44, y), fill="brown", width=3)
    return image


def test_embeddings_are_float32_rows_of_length_one(efficientnet: Evaluator) -> None:
    embeddings = efficientnet.embed([_ball("red"), _ladder()])
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (2, 1280)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)


def test_a_similar_picture_is_nearer_than_another_thing(efficientnet: Evaluator) -> None:
    red, orange, ladder = efficientnet.embed([_ball("red"), _ball("orangered"), _ladder()])
    assert float(red @ orange) > float(red @ ladder) + 0.2


def test_embeddings_do_not_depend_on_the_batch(efficientnet: Evaluator) -> None:
    images = [_ball("red"), _ladder(), _ball("blue")] * 6  # more than one batch
    together = efficientnet.embed(images)
    assert torch.allclose(together[17], efficientnet.embed(images[17:])[0], atol=1e-5)


def test_image_mode_and_size_do_not_matter_to_the_caller(efficientnet: Evaluator) -> None:
    assert efficientnet.embed([Image.new("L", (30, 50)), Image.new("RGBA", (300, 200))]).shape == (2, 1280)


def test_clip_is_loaded_from_a_folder(clip_folder: Path) -> None:
    evaluator = load_evaluator(f"clip:{clip_folder}")
    assert evaluator.size_px == 32
    assert evaluator.label == "clip-tiny-clip"
    assert evaluator.embed([_ball("red")]).shape == (1, 24)


def test_dinov2_is_loaded_from_a_folder(dinov2_folder: Path) -> None:
    evaluator = load_evaluator(f"dinov2:{dinov2_folder}")
    embeddings = evaluator.embed([_ball("red"), _ladder()])
    assert embeddings.shape == (2, 32)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("name", ["vgg16", "clip", "dinov2:", "efficientnet-lite0:x"])
def test_an_unknown_name_lists_what_exists(name: str) -> None:
    listing = "efficientnet-lite0, clip:FOLDER_OR_HUB_ID, dinov2:FOLDER_OR_HUB_ID"
    with pytest.raises(InputError, match=f"expected an evaluator among {listing}, got '{name}'"):
        load_evaluator(name)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder with a clip model .* got no folder .*nowhere"):
        load_evaluator(f"clip:{tmp_path / 'nowhere'}")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected config.json in .* got none"):
        load_evaluator(f"clip:{tmp_path}")


def test_a_folder_with_another_model_is_refused(clip_folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected a dinov2 model in .* got model_type 'clip'"):
        load_evaluator(f"dinov2:{clip_folder}")


def test_a_model_without_some_of_its_weights_is_refused(dinov2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(dinov2_folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((dinov2_folder / "config.json").read_text())
    with pytest.raises(
        InputError, match=r"expected a whole dinov2 model .* got one without a fitting layernorm.weight"
    ):
        load_evaluator(f"dinov2:{tmp_path}")


PROJECT = Path(__file__).resolve().parents[2]


def test_the_bundled_towers_are_an_evaluator_and_find_the_background_in_a_picture() -> None:
    from transformers import CLIPTokenizer

    from dreamartist_pipeline.embedded.colors import COLORS

    towers = PROJECT / "data/01_raw/towers"
    tokenizer = CLIPTokenizer.from_pretrained(PROJECT / "data/01_raw/base_model/tokenizer", local_files_only=True)
    pictures = []
    for color in COLORS.values():
        pictures.append(Image.new("RGB", (64, 64), color))
        ImageDraw.Draw(pictures[-1]).ellipse((16, 16, 48, 48), fill=(200, 120, 60))
    images = load_evaluator(f"clip:{towers}").embed(pictures)
    captions = [f"a ball, {name} background" for name in COLORS]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        texts = CLIPModel.from_pretrained(towers, local_files_only=True).float().get_text_features(input_ids=ids)
    directions = torch.nn.functional.normalize(texts.pooler_output, dim=1)
    found = (images @ directions.T).argmax(dim=1)
    assert (found == torch.arange(len(COLORS))).sum() >= 10  # of 12
