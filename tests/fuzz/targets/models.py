"""Files that hold weights, concepts or base models."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from kedro.io import DatasetError
from safetensors.torch import load

from concept_bytes import concept_bytes
from conftest import build_tiny_base_model
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, concept_metadata, start_concept
from dreamartist_pipeline.backbones.evaluators import load_evaluator
from dreamartist_pipeline.backbones.families import Backbone, ModelSource
from dreamartist_pipeline.backbones.holding.folder import LonePart
from dreamartist_pipeline.backbones.holding.single_file import SingleFileParts
from dreamartist_pipeline.backbones.layouts import layout_of
from dreamartist_pipeline.core.branches import BRANCH_NAMES
from dreamartist_pipeline.core.concept import TriggerWord
from dreamartist_pipeline.core.layout import ModelLayout
from dreamartist_pipeline.core.starting import Start
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.datasets.user_files import UserFilesDataset, folder_files
from dreamartist_pipeline.embedded.datasets import JudgeDataset
from dreamartist_pipeline.embedded.judge import Judge, JudgeVocabulary
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import branch_adapter
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.foreign_concept import read_toolkit_folder
from dreamartist_pipeline.interop.foreign_lora import read_lora
from dreamartist_pipeline.interop.kohya import write_kohya
from dreamartist_pipeline.interop.peft_files import write_peft
from dreamartist_pipeline.interop.toolkit import write_toolkit
from dreamartist_pipeline.interop.word_files import read_embedding, word_inside, write_embedding, write_embedding_pt
from dreamartist_pipeline.params import DeviceParams, StrengthParams, TrainingParams
from dreamartist_pipeline.pipelines.training.starting import apply_start, read_start
from fuzz.fuzzing import Target
from fuzz.mutations import mutated
from fuzz.structures import mutate_safetensors, mutate_torch
from single_files import write_single_file
from tiny_models import build_sd1

_STEP = 100
_GROUPS = [{"lr": 1e-3, "rank": 2, "branch": branch, "layers": (r"re:mid_block.*attn1\.to_q$",)} for branch in "pn"]
_TEXT_GROUPS = [{"lr": 1e-3, "rank": 2, "layers": (r"re:.*layers\.0\.mlp\.fc1$",)}]
_TRAINING: dict[str, Any] = {
    "num_steps": 3,
    "templates": ("a photo of a {pt1}",),
    "words": {"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3)},
    "lora_unet": _GROUPS,
    "lora_text_encoder": _TEXT_GROUPS,
}


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz_models_"))


@functools.cache
def _base_model() -> Path:
    return build_tiny_base_model(_folder() / "base_model", seed=0)


@functools.cache
def _backbone() -> Backbone:
    return load_backbone(BaseModelFiles(_base_model()), DeviceParams(device="cpu", dtype="float32"))


@functools.cache
def _layout() -> ModelLayout:
    return layout_of(_backbone())


@functools.cache
def _params() -> TrainingParams:
    return TrainingParams(**_TRAINING)


@functools.cache
def _concept() -> Any:
    backbone, params = _backbone(), _params()
    concept = start_concept(backbone, params, 1.0, seed=0).snapshot(concept_metadata(backbone, params, 1.0))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in concept.tensors.items()}
    return type(concept)(tensors, concept.metadata)


@functools.cache
def _facts() -> FileFacts:
    return FileFacts("fox", "my-fox", "epsilon", _layout().names)


def _word() -> TriggerWord:
    return next(word for word in _concept().trigger_words() if word.branch == "positive")


def _mutate_by_kind(data: bytes, seed: int) -> bytes:
    return mutate_torch(data, seed) if data[:1] in (b"P", b"\x80") else mutate_safetensors(data, seed)


def _saved(content: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _read_concept(file: Path) -> object:
    dataset = ConceptDataset(filepath=str(file))
    dataset.preview()
    return attach(_backbone(), dataset.load(), StrengthParams())


def _start(file: Path) -> object:
    params = TrainingParams(**_TRAINING, start_from=str(file))
    start: Start | None = read_start(UserFilesDataset(path="", files=str(file)).load(), params)
    fresh = start_concept(_backbone(), params, 1.0, seed=0)
    return apply_start(start, fresh.stacks, fresh.words, params, _backbone())


def _lora_samples() -> Mapping[str, bytes]:
    adapter = branch_adapter(_concept(), "positive")
    kohya, peft = (write(adapter, _facts(), torch.float32) for write in (write_kohya, write_peft))
    scaled = peft.replace(b'"__metadata__":{', b'"__metadata__":{"lora_adapter_metadata":"{}",', 1)
    length = len(scaled) - len(peft) + int.from_bytes(peft[:8], "little")
    return {"kohya.safetensors": kohya, "peft.safetensors": length.to_bytes(8, "little") + scaled[8:]}


def _read_lora(file: Path) -> object:
    return read_lora(file.read_bytes(), file.name, _layout().shapes, _layout().names)


def _word_samples() -> Mapping[str, bytes]:
    vectors = torch.ones(2, 32)
    return {
        "fox.safetensors": write_embedding(_word(), _facts(), torch.float32),
        "fox.pt": write_embedding_pt(_word()),
        "old.pt": _saved({"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})}),
        "older.bin": _saved({"<fox>": vectors}, zipped=False),
    }


def _read_word(file: Path) -> object:
    data = file.read_bytes()
    return read_embedding(data, file.name), word_inside(data, file.name)


def _toolkit_samples() -> Mapping[str, bytes]:
    adapters = {branch: branch_adapter(_concept(), branch) for branch in BRANCH_NAMES}
    files = write_toolkit({"positive": adapters["positive"]}, [], _STEP, _layout().names)
    name, data = next((name, data) for name, data in files.items() if name.startswith("unet"))
    tensors = {
        "lora:mid_block.x.___.alpha": torch.tensor(1.0),
        "lora:mid_block.x.___.layer.lora_up.weight": torch.ones(2, 2),
    }
    return {name: data, f"unet-{_STEP}.ckpt": _saved({"lora": tensors})}


def _read_toolkit(file: Path) -> object:
    return read_toolkit_folder(folder_files(file.parent), str(file.parent), _layout(), {}, None, "import.names.{slot}")


def _base_model_samples(names: Callable[[Path], bool]) -> Mapping[str, bytes]:
    """Return the files of the base model, whose names have a ~ for every /."""
    files = [file for file in _base_model().rglob("*") if file.is_file() and names(file)]
    return {file.relative_to(_base_model()).as_posix().replace("/", "~"): file.read_bytes() for file in files}


def _read_base_model(file: Path) -> object:
    """Put a file into the base model, and load its outline."""
    target = _base_model() / file.name.replace("~", "/")
    before = target.read_bytes()
    target.write_bytes(file.read_bytes())
    try:
        files = BaseModelFiles(_base_model())
        files.check()
        source = ModelSource(files.name, "", files.parts())
        backbone = files.family().load(source, torch.device("meta"), torch.float32)
        return layout_of(backbone), backbone.image_px, backbone.file_names
    finally:
        target.write_bytes(before)


@functools.cache
def _autoencoder() -> Path:
    """Return the folder of an autoencoder without weights."""
    folder = _folder() / "autoencoder"
    folder.mkdir()
    (folder / "config.json").write_bytes((_base_model() / "vae" / "config.json").read_bytes())
    return folder


def _weight_samples() -> Mapping[str, bytes]:
    data = (_base_model() / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    tensors = load(data)
    return {"model.safetensors": data, "model.bin": _saved(tensors), "model-old.bin": _saved(tensors, zipped=False)}


def _read_weights(file: Path) -> object:
    target = _autoencoder() / f"diffusion_pytorch_model{file.suffix}"
    target.write_bytes(file.read_bytes())
    try:
        parts = LonePart(_autoencoder())
        parts.check(["vae"])
        return parts.module(AutoencoderKL, "vae", torch.device("cpu"), torch.float32)
    finally:
        target.unlink()


@functools.cache
def _single_file() -> Path:
    folder = build_sd1(_folder() / "sd1")
    return write_single_file(folder, _folder() / "model.safetensors", dtype=torch.float16)


def _single_file_samples() -> Mapping[str, bytes]:
    pickled = write_single_file(_folder() / "sd1", _single_file().with_suffix(".ckpt"), dtype=torch.float16)
    return {"model.safetensors": _single_file().read_bytes(), "model.ckpt": pickled.read_bytes()}


def _read_single_file(file: Path) -> object:
    parts = SingleFileParts(file)
    family = BaseModelFiles(file).family()
    parts.check(family.parts())
    converted = sorted((*family.network_classes, "vae"))[zlib.crc32(file.read_bytes()) % 3]  # one of three, for time
    return parts.tensors(converted), parts.names()


def _judge_samples() -> Mapping[str, bytes]:
    file = _folder() / "judge.safetensors"
    JudgeDataset(filepath=str(file)).save(Judge(JudgeVocabulary(("cat", "dog"), ("flat",)), (4, 4)))
    return {file.name: file.read_bytes()}


@functools.cache
def _towers() -> Path:
    from transformers import CLIPConfig, CLIPModel

    folder = _folder() / "towers"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text, vision = {**sizes, "vocab_size": 20}, {**sizes, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    return folder


def _tower_samples() -> Mapping[str, bytes]:
    return {file.name: file.read_bytes() for file in _towers().iterdir()}


def _read_towers(file: Path) -> object:
    target = _towers() / file.name
    before = target.read_bytes()
    target.write_bytes(file.read_bytes())
    try:
        return load_evaluator(f"clip:{_towers()}")
    finally:
        target.write_bytes(before)


def _mutate_any(data: bytes, seed: int) -> bytes:
    """Mutate JSON by its values, and files of tensors by their structure."""
    if data[:1] in (b"{", b"#"):
        return mutated(data, seed)
    return _mutate_by_kind(data, seed)


def _is_json(file: Path) -> bool:
    return file.suffix in (".json", ".txt")


def _concept_sample() -> Mapping[str, bytes]:
    return {"concept.safetensors": concept_bytes(_concept())}


def _read_judge(file: Path) -> object:
    return JudgeDataset(filepath=str(file)).load()


_OF_DATASETS = (InputError, DatasetError)
TARGETS = [
    Target("concept", _concept_sample, _read_concept, _OF_DATASETS, mutate_safetensors),
    Target("start", _concept_sample, _start, mutate=mutate_safetensors),
    Target("lora", _lora_samples, _read_lora, mutate=mutate_safetensors),
    Target("embedding", _word_samples, _read_word, mutate=_mutate_by_kind),
    Target("toolkit", _toolkit_samples, _read_toolkit, mutate=_mutate_by_kind),
    Target("base model", lambda: _base_model_samples(_is_json), _read_base_model),
    Target("weights", _weight_samples, _read_weights, mutate=_mutate_by_kind),
    Target("single file", _single_file_samples, _read_single_file, mutate=_mutate_by_kind),
    Target("judge", _judge_samples, _read_judge, _OF_DATASETS, mutate_safetensors),
    Target("towers", _tower_samples, _read_towers, mutate=_mutate_any),
]
