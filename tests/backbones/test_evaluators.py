"""Evaluators: their embeddings and scores, and their errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

from dreamartist_pipeline.backbones.evaluators import (
    Evaluator,
    load_evaluator,
    load_evaluators,
    load_text_image_model,
    own_towers,
)
from dreamartist_pipeline.errors import InputError
from refusals import says


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
    assert evaluator.processor.size == {"height": 32, "width": 32}
    assert evaluator.label == "clip-tiny-clip"
    assert evaluator.embed([_ball("red")]).shape == (1, 24)


def test_dinov2_is_loaded_from_a_folder(dinov2_folder: Path) -> None:
    evaluator = load_evaluator(f"dinov2:{dinov2_folder}")
    embeddings = evaluator.embed([_ball("red"), _ladder()])
    assert embeddings.shape == (2, 32)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP with a tokenizer of four words."""
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts = {**tower, "vocab_size": 5, "max_position_embeddings": 6, "pad_token_id": 1}
    config = SiglipConfig(text_config=texts, vision_config={**tower, "image_size": 32, "patch_size": 16})
    folder = tmp_path_factory.mktemp("models") / "tiny-siglip"
    SiglipModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "fox": 3, "cat": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_siglip_is_loaded_from_a_folder(siglip_folder: Path) -> None:
    evaluator = load_evaluator(f"siglip:{siglip_folder}")
    embeddings = evaluator.embed([_ball("red"), _ladder()])
    assert (evaluator.label, embeddings.shape) == ("siglip-tiny-siglip", (2, 32))
    prepared = evaluator._prepare([Image.new("RGB", (8, 8), "white")])
    assert (prepared.shape, float(prepared.min())) == ((1, 3, 32, 32), 1.0)


def test_siglip_scores_as_transformers_does(siglip_folder: Path, tmp_path: Path) -> None:
    model = load_text_image_model(f"siglip:{siglip_folder}", str(tmp_path))
    assert model is not None
    assert model.measure.name == "prompt/siglip_score"
    images, network = [_ball("red"), _ladder()], SiglipModel.from_pretrained(siglip_folder)
    ids = torch.tensor([[2, 3, 1, 1, 1, 1], [2, 4, 2, 4, 2, 4]])  # padded, truncated
    with torch.inference_mode():
        logits = network(input_ids=ids, pixel_values=model.images._prepare(images)).logits_per_image
    expected = torch.sigmoid(logits.diagonal())
    torch.testing.assert_close(model.score(images, ["a fox", "a cat a cat a cat a cat"]), expected)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(siglip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(siglip_folder, tmp_path / "siglip"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["dog"] = 5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, check=says(expected="5 tokens", got="6")):
        load_text_image_model(f"siglip:{folder}", str(tmp_path))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, check=says(expected="tokenizer.json")):
        load_text_image_model(f"siglip:{folder}", str(tmp_path))


def test_auto_is_the_image_tower_of_a_base_model_that_has_one(tmp_path: Path) -> None:
    own = load_evaluators(["auto", "efficientnet-lite0"], str(PROJECT / "data/01_raw/base_model"))
    assert [one.label for one in own] == ["clip-towers", "efficientnet-lite0"]
    assert [one.label for one in load_evaluators(["auto", "efficientnet-lite0"], str(tmp_path))] == [
        "efficientnet-lite0"
    ]


@pytest.mark.parametrize("name", ["vgg16", "clip", "dinov2:", "efficientnet-lite0:x"])
def test_an_unknown_name_lists_what_exists(name: str) -> None:
    listing = "efficientnet-lite0, clip:FOLDER_OR_HUB_ID, siglip:FOLDER_OR_HUB_ID, dinov2:FOLDER_OR_HUB_ID, auto"
    with pytest.raises(InputError, check=says(expected=listing, got=f"'{name}'")):
        load_evaluator(name)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, check=says(expected="clip", got=f"no such folder at {tmp_path / 'nowhere'}")):
        load_evaluator(f"clip:{tmp_path / 'nowhere'}")


def test_a_name_that_is_neither_a_folder_nor_an_id_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="OWNER/NAME", got="'nowhere'", remedy="evaluators")):
        load_evaluator("clip:nowhere")


def test_an_image_processor_that_names_code_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (folder / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "evil.Evil"}}')
    with pytest.raises(InputError, check=says(expected="preprocessor_config.json", got="auto_map")):
        load_evaluator(f"clip:{folder}")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, check=says(expected="clip", got="no config.json")):
        load_evaluator(f"clip:{tmp_path}")


def test_a_folder_with_another_model_is_refused(clip_folder: Path) -> None:
    with pytest.raises(InputError, check=says(expected="dinov2", got="model_type clip")):
        load_evaluator(f"dinov2:{clip_folder}")


def test_a_model_without_some_of_its_weights_is_refused(dinov2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(dinov2_folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((dinov2_folder / "config.json").read_text())
    with pytest.raises(InputError, check=says(expected="dinov2", got="layernorm.weight")):
        load_evaluator(f"dinov2:{tmp_path}")


PROJECT = Path(__file__).resolve().parents[2]


def test_a_models_own_processor_is_used_without_its_cropping(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    folder = shutil.copytree(clip_folder, tmp_path / "own")
    CLIPImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 48}).save_pretrained(folder)
    wide = Image.new("RGB", (64, 32), "white")
    wide.paste("black", (0, 0, 8, 32))  # outside of a crop of the middle
    prepared = load_evaluator(f"clip:{folder}")._prepare([wide])
    assert prepared.shape == (1, 3, 32, 32)
    assert (float(prepared.min()), float(prepared.max())) == (-1.0, 1.0)


def test_pictures_are_resized_and_normalised_as_by_hand(efficientnet: Evaluator) -> None:
    image = _ladder()
    resized = torch.tensor(list(image.resize((224, 224), Image.Resampling.BICUBIC).tobytes()), dtype=torch.float32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((resized.reshape(224, 224, 3) / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(efficientnet._prepare([image])[0], expected)


def test_a_clip_model_without_a_tokenizer_cannot_read_texts(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, check=says(expected="99", remedy="evaluation.text_image_model")):
        load_text_image_model(f"clip:{clip_folder}", str(tmp_path))


def test_the_bundled_towers_belong_to_the_bundled_base_model_and_to_no_other(
    tiny_base_model: Path, tmp_path: Path
) -> None:
    base_model = PROJECT / "data/01_raw/base_model"
    assert own_towers(str(base_model)) == PROJECT / "data/01_raw/towers"
    assert own_towers(str(tiny_base_model)) is None
    other = shutil.copytree(tiny_base_model / "text_encoder", tmp_path / "base_model" / "text_encoder")
    shutil.copytree(PROJECT / "data/01_raw/towers", tmp_path / "towers", ignore=lambda *_: ["model.safetensors"])
    assert own_towers(str(other.parent)) is None  # of other words
    assert own_towers("hub:stable-diffusion-v1-5/stable-diffusion-v1-5") is None


def test_the_bundled_towers_score_a_picture_highest_with_its_own_background() -> None:
    from dreamartist_pipeline.embedded.colors import COLORS

    model = load_text_image_model("auto", str(PROJECT / "data/01_raw/base_model"))
    assert model is not None
    fox = Image.open(PROJECT / "data/01_raw/reference_images/fox.png")
    scores = dict(zip(COLORS, model.score([fox] * 12, [f"a fox, {name} background" for name in COLORS]), strict=True))
    assert max(scores, key=lambda name: float(scores[name])) == "white"
    assert 1 < scores["white"] < 2.5
    assert model.score([fox], ["two cats, red background"]) < 0.5
