"""A family of base models is one subclass.

A toy with two text encoders, pooled states, float timesteps and flow matching goes through the nodes as they stand.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load, load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from dreamartist_pipeline.backbones.families import FAMILIES, Backbone
from dreamartist_pipeline.backbones.families.backbone import frozen
from dreamartist_pipeline.backbones.families.clip_text import text_states
from dreamartist_pipeline.core.diffusion import Objective
from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.embedded.model import build_text_encoder
from dreamartist_pipeline.params import DeviceParams, ExportParams, GenerateParams, TrainingParams
from dreamartist_pipeline.pipelines.export.nodes import check_files, write_files
from dreamartist_pipeline.pipelines.generate.nodes import generate_images
from dreamartist_pipeline.pipelines.training.nodes import check_training, train_concept

from ..conftest import TINY_SIZE

CPU, ENCODERS = DeviceParams(device="cpu"), ("text_encoder", "text_encoder_2")
WIDTHS = {"text_encoder": 32, "text_encoder_2": 64}
SAMPLER = {"scheduler": "UniPCMultistepScheduler", "num_inference_steps": 3}
seen: list[torch.Tensor] = []  # timesteps that the toy was asked for


class Flow(Objective):
    """z_t = (1 − s) · z₀ + s · ε and the target ε − z₀, at noise levels s = t / 1000 for a float t."""

    prediction_type = "flow_prediction"

    def sample_timesteps(self, limits, num_rows, generator):
        low, high = limits
        return 1000 * (low + (high - low) * torch.rand(num_rows, generator=generator))

    def noise_level(self, timesteps):
        return timesteps.float() / 1000

    def add_noise(self, latents, noise, timesteps):
        return torch.lerp(latents, noise, self.noise_level(timesteps).view(-1, 1, 1, 1))

    def target(self, latents, noise, timesteps):
        return noise - latents

    def predicted_latents(self, noisy_latents, prediction, timesteps):
        return noisy_latents - self.noise_level(timesteps).view(-1, 1, 1, 1) * prediction

    def loss_weight(self, weighting, gamma, timesteps):
        return torch.ones(len(timesteps))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"latents": 4, "text": sum(WIDTHS.values()), "pooled": WIDTHS["text_encoder_2"], "time": 1}
        self.inputs = nn.ModuleDict({name: nn.Linear(size, 16) for name, size in sizes.items()})
        self.out = nn.Linear(16, 4)

    def forward(self, latents, level, hidden, pooled):
        rows = {"text": hidden.mean(1), "pooled": pooled, "time": level[:, None]}
        told = sum(self.inputs[name](value) for name, value in rows.items())[:, None]
        states = torch.tanh(self.inputs["latents"](latents.flatten(2).mT) + told)  # [N, h·w, 16]
        return self.out(states).mT.reshape(latents.shape)


@dataclass(frozen=True)
class TextStates:
    hidden: torch.Tensor  # [N, L, 96], of both encoders
    pooled: torch.Tensor  # [N, 64], of the second

    def __getitem__(self, rows: torch.Tensor) -> TextStates:
        return TextStates(self.hidden[rows], self.pooled[rows])


@dataclass(kw_only=True)
class Toy(Backbone):
    family: ClassVar = "toy"
    pipelines: ClassVar = ("ToyPipeline",)
    parts: ClassVar = dict.fromkeys(("transformer", "vae", *ENCODERS), "config.json")
    file_names: ClassVar = FileNames(
        kohya_prefixes={"transformer": "lora_transformer_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
        outer_modules=dict.fromkeys(ENCODERS, "text_model."),
        embedding_keys={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        architecture="toy",
        kohya_version="toy_v1",
    )

    @classmethod
    def load(cls, source, device, dtype):
        folder, transformer = Path(source.location), Transformer()
        transformer.load_state_dict(load_file(folder / "transformer" / "model.safetensors"))
        networks = {"transformer": transformer, **{n: CLIPTextModel.from_pretrained(folder / n) for n in ENCODERS}}
        return cls(
            name=source.name,
            fingerprint=source.fingerprint,
            networks={name: frozen(network, device) for name, network in networks.items()},
            tokenizers={name: CLIPTokenizer.from_pretrained(folder / "tokenizer") for name in ENCODERS},
            autoencoder=frozen(AutoencoderKL.from_pretrained(folder / "vae"), device),
            objective=Flow(),
            scheduler_config={"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            device=device,
            dtype=dtype,
            image_px=32,
        )

    def encode(self, tokens, clip_skip):
        first, second = (text_states(self.networks[name], tokens[name].ids, clip_skip) for name in ENCODERS)
        return TextStates(torch.cat([first, second], dim=-1), second[:, -1])

    def predict(self, latents, timesteps, conditioning):
        seen.append(timesteps)
        return self.networks["transformer"](latents, timesteps / 1000, conditioning.hidden, conditioning.pooled)


@pytest.fixture
def toy(tmp_path: Path, tiny_base_model: Path) -> Iterator[str]:
    """The folder of a toy base model, its family registered."""
    folder = Path(shutil.copytree(tiny_base_model, tmp_path / "toy"))
    (folder / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    torch.manual_seed(0)
    wider = TINY_SIZE.model_copy(update={"text_width": WIDTHS["text_encoder_2"]})
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    build_text_encoder(wider, tokenizer).save_pretrained(folder / "text_encoder_2")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")
    save_file(Transformer().state_dict(), folder / "transformer" / "model.safetensors")
    FAMILIES.append(Toy)
    yield str(folder)
    FAMILIES.remove(Toy)


def test_a_new_family_trains_draws_saves_reloads_and_exports(
    toy: str, tmp_path: Path, make_training_params: Callable[..., TrainingParams]
) -> None:
    transformer = [{"lr": 1e-2, "rank": 2, "branch": branch, "layers": ("re:inputs|out",)} for branch in "pn"]
    groups = {f"lora_{encoder}": make_training_params().lora_text_encoder for encoder in ENCODERS}
    groups |= {"lora_unet": (), "lora_transformer": transformer}
    preview = {"every": 3, "prompts": ["a {pt1}"], "sampler": SAMPLER}
    params = make_training_params(num_steps=3, regularization_batch_size=0, preview=preview, **groups)
    picture, mask, tracker = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 127), Mock()

    plan = check_training(toy, params, "", CPU)
    concept, history = train_concept(toy, picture, mask, [], plan, params, "", CPU, tracker)

    trained = {group["name"] for group in plan["groups"]}
    networks, words = ("transformer.{}", "text_encoder.{}", "text_encoder_2.{}"), ("words", "words_text_encoder_2")
    assert trained == {
        *(network.format(group) for network in networks for group in ("0.positive", "1.negative")),
        *(f"{part}.{branch}.pt1" for part in words for branch in ("negative", "positive")),
    }
    assert all(tensor.any() for name, tensor in concept.tensors.items() if name.endswith(".up"))
    assert [concept.tensors[f"{part}.positive.pt1"].shape for part in words] == [(2, 32), (2, 64)]
    assert any((t.frac() != 0).any() for t in seen if t.is_floating_point())
    assert history["loss"].notna().all() and tracker.log_image.call_count == 1

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
