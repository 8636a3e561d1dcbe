"""A family of base models is one subclass of `Backbone`: the toy family trains, draws and exports unchanged nodes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load
from transformers import CLIPTokenizer

from dreamartist_pipeline.backbones.families import FAMILIES
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.embedded.model import build_text_encoder
from dreamartist_pipeline.params import DeviceParams, ExportParams, GenerateParams, TrainingParams
from dreamartist_pipeline.pipelines.export.nodes import check_files, write_files
from dreamartist_pipeline.pipelines.generate.nodes import generate_images
from dreamartist_pipeline.pipelines.training.nodes import check_training, train_concept

from ..conftest import TINY_SIZE
from .toy_family import ENCODERS, TRANSFORMER, Toy, Transformer

CPU = DeviceParams(device="cpu")
SAMPLER = {"scheduler": "UniPCMultistepScheduler", "num_inference_steps": 3}


@pytest.fixture
def toy(tmp_path: Path, tiny_base_model: Path) -> Iterator[str]:
    """The folder of a toy base model, its family registered."""
    folder = Path(shutil.copytree(tiny_base_model, tmp_path / "toy"))
    (folder / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    torch.manual_seed(0)
    wider = TINY_SIZE.model_copy(update={"text_width": 64})
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    build_text_encoder(wider, tokenizer).save_pretrained(folder / "text_encoder_2")
    Transformer().save_pretrained(folder / "transformer")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.save_pretrained(folder / "scheduler")
    FAMILIES.append(Toy)
    yield str(folder)
    FAMILIES.remove(Toy)


def test_a_new_family_trains_draws_saves_reloads_and_exports(
    toy: str, tmp_path: Path, make_training_params: Callable[..., TrainingParams], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    predict = Toy.predict
    monkeypatch.setattr(
        Toy, "predict", lambda self, latents, t, *others: (seen.append(t), predict(self, latents, t, *others))[1]
    )
    adapters = [
        {"lr": 1e-2, "rank": 2, "branch": branch, "layers": ("re:latents|text|pooled|time|out",)} for branch in "pn"
    ]
    groups = {f"lora_{encoder}": make_training_params().lora_text_encoder for encoder in ENCODERS}
    groups |= {"lora_unet": (), f"lora_{TRANSFORMER}": adapters}
    preview = {"every": 3, "prompts": ["a {pt1}"], "sampler": SAMPLER}
    params = make_training_params(num_steps=3, regularization_batch_size=0, preview=preview, **groups)
    picture, mask, tracker = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 127), Mock()

    plan = check_training(toy, params, "", CPU)
    concept, history, *_ = train_concept(toy, picture, mask, [], plan, params, "", CPU, tracker)

    trained = {group["name"] for group in plan["groups"]}
    networks, words = ("transformer.{}", "text_encoder.{}", "text_encoder_2.{}"), ("words", "words_text_encoder_2")
    assert trained == {
        *(network.format(group) for network in networks for group in ("0.positive", "1.negative")),
        *(f"{part}.{branch}.pt1" for part in words for branch in ("negative", "positive")),
    }
    assert all(tensor.any() for name, tensor in concept.tensors.items() if name.endswith(".up"))
    assert [concept.tensors[f"{part}.positive.pt1"].shape for part in words] == [(2, 32), (2, 64)]
    assert any((t.frac() != 0).any() for t in seen if t.is_floating_point())
    assert history["loss"].notna().all() and tracker.log_image.call_count == 2  # before the first step, after the last

    dataset = ConceptDataset(filepath=str(tmp_path / "concept.safetensors"))
    dataset.save(concept)
    drawn, again = (
        generate_images(toy, each, GenerateParams(prompts=["a {pt1}"], images_per_prompt=1, sampler=SAMPLER), CPU)[0]
        for each in (concept, dataset.load())
    )
    assert {n: i.tobytes() for n, i in drawn.items()} == {n: i.tobytes() for n, i in again.items()}

    export = ExportParams(title="toy", prompt="a {pt1}", formats=("kohya", "peft", "embeddings"), sampler=SAMPLER)
    files, report = check_files(toy, dataset.load(), write_files(toy, dataset.load(), export), export)
    assert {key.split("_")[1] for key in load(files["lora/toy.safetensors"])} == {"transformer", "te1", "te2"}
    embedding = load(files["embeddings/my-fox.safetensors"])
    assert {key: vectors.shape for key, vectors in embedding.items()} == {"clip_l": (2, 32), "clip_g": (2, 64)}
    assert report["files"]["lora/toy-neg.safetensors"]["num_layers"] == 5 + 2 * 12  # the transformer, two encoders
