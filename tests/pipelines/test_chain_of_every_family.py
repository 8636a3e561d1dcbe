"""The whole way once per family: ingest, regularize, train, reload, draw, evaluate, export, import.

The files of the export are also compared with the names that other tools look for, see `tool_names`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline, open_base_model
from dreamartist_pipeline.backbones.concepts import attach, generate
from dreamartist_pipeline.backbones.lora_files import concept_predictions, make_probe
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.sampling import image_generators, initial_noise
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.datasets.file_folder import FileFolderDataset
from dreamartist_pipeline.interop.foreign_lora import read_lora
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata
from dreamartist_pipeline.params import (
    BucketParams,
    DeviceParams,
    EvaluationParams,
    ExportParams,
    GenerateParams,
    ImportParams,
    IngestionParams,
    RegularizationParams,
    TrainingParams,
)
from dreamartist_pipeline.pipelines.export.nodes import check_files, write_files
from dreamartist_pipeline.pipelines.generate.nodes import generate_images
from dreamartist_pipeline.pipelines.importing.nodes import import_concept
from dreamartist_pipeline.pipelines.ingestion.nodes import prepare_reference
from dreamartist_pipeline.pipelines.regularization.nodes import make_regularization_set
from dreamartist_pipeline.pipelines.training.nodes import check_training, train_concept
from image_sets import evaluate, set_dataset
from tiny_models import BUILDERS
from tool_names import a1111_names, comfyui_names, kohya_names, original_unet

CPU = DeviceParams(device="cpu")
SAMPLER: dict[str, Any] = {"scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 2}
ARCHITECTURES = {
    "sd1": ("stable-diffusion-v1", "sd_v1", "epsilon", "False"),
    "sd2-v": ("stable-diffusion-v2", "sd_v2", "v", "True"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "epsilon", "False"),
    "sdxl-v": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "v", "False"),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_tool_knows_the_name_of_every_layer(name: str, tiny_model: Callable[[str], Path]) -> None:
    outline = load_outline(BaseModelFiles(tiny_model(name)))
    names, shapes = outline.file_names, outline.layer_shapes
    unusual = "time_embedding", "add_embedding", "text_projection"
    layers = [(n, layer) for n, layers in shapes.items() for layer in layers if not layer.startswith(unusual)]
    files = {names.kohya(*at) for at in layers}
    assert len(files) == len(layers)
    assert not files - comfyui_names(name) and not files - a1111_names(name)
    assert files - kohya_names(name) <= {names.kohya("unet", layer) for layer in ("conv_in", "conv_out")}


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    name: str
    base_model: str
    framing: dict[str, tuple[int, int]]
    concept: Concept
    reloaded: Concept
    reference: Image.Image
    files: dict[str, bytes]
    report: dict[str, Any]
    folder: Path

    @property
    def encoders(self) -> list[str]:
        return ["text_encoder", "text_encoder_2"] if self.name.startswith("sdxl") else ["text_encoder"]


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def training_params(name: str) -> TrainingParams:
    text = [{"lr": 1e-2, "rank": 1, "branch": b, "layers": ("re:.*self_attn$", "re:.*mlp$")} for b in "pn"]
    layers = (r"re:.*attn2\.to_k$", r"re:.*resnets\.0\.conv1$", "re:.*samplers.0.conv$")
    return TrainingParams(
        num_steps=2,
        batch_size=1,
        templates=("a {pt1}",),
        class_word="fox",
        words={"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3), "lr": 1e-2},
        preview={"every": 2, "prompts": ["a {pt1}"], "sampler": SAMPLER},
        lora_unet=[{"lr": 1e-2, "rank": 2, "branch": b, "layers": layers} for b in "pn"],
        lora_text_encoder=text,
        **({"lora_text_encoder_2": text} if name.startswith("sdxl") else {}),
    )


@pytest.fixture(scope="module", params=BUILDERS)
def run(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: Any) -> Run:
    """Train, save, reload and export a concept."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    base_model, params = str(tiny_model(name)), training_params(name)
    picture = Image.new("RGB", (120, 80), "orange")
    picture.paste("purple", (30, 20, 60, 70))
    ingestion = IngestionParams(bucket={"side_px": 64, "multiple_px": 8})
    image, mask, framing = prepare_reference(as_png(picture), None, ingestion)
    sets = set_dataset(folder / "set.json", folder / "sets")
    regularization = RegularizationParams(sampler=SAMPLER)
    sets.save(make_regularization_set(base_model, ["a red cat", "a blue dog"], regularization, ingestion, CPU))
    plan = check_training(base_model, params, "", CPU)
    concept, history, *_ = train_concept(
        base_model, image, mask, sets.load(), plan, params, "", CPU, Mock(), prepared_framing=framing
    )
    assert history["loss"].notna().all()
    dataset = ConceptDataset(filepath=str(folder / "concept.safetensors"))
    dataset.save(concept)
    formats = ("kohya", "peft", "embeddings") if name.startswith("sdxl") else ("kohya", "peft", "embeddings", "toolkit")
    export = ExportParams(title="fox", formats=formats, prompt="a {pt1}", sampler=SAMPLER)
    files, report = check_files(base_model, concept, write_files(base_model, concept, export), export)
    return Run(name, base_model, framing, concept, dataset.load(), image, files, report, folder)


def test_every_network_and_word_is_trained_and_reloaded(run: Run) -> None:
    assert run.framing == {"original_px": (120, 80), "crop_px": (16, 0), "size_px": (64, 64)}
    metadata = run.reloaded.metadata
    trained = {network for network, groups in metadata.lora.items() if groups}
    assert trained == {"unet", *run.encoders}
    changed = {name.partition(".")[0] for name, t in run.concept.tensors.items() if name.endswith(".up") and t.any()}
    assert changed == trained
    words = {name for name in run.concept.tensors if name.startswith("words")}
    assert len(words) == 2 * len(run.encoders)
    assert {n: t.tolist() for n, t in run.reloaded.tensors.items()} == {
        n: t.tolist() for n, t in run.concept.tensors.items()
    }


def test_it_draws_from_noise_and_from_a_picture(run: Run) -> None:
    params = GenerateParams(prompts=["a {pt1}"], images_per_prompt=1, sampler=SAMPLER)
    mask = Image.new("L", run.reference.size)
    mask.paste(255, (32, 0, 64, 64))
    given = [(), (as_png(run.reference),), (as_png(run.reference), as_png(mask))]
    images = [generate_images(run.base_model, run.reloaded, params, CPU, *each)[0]["000_0"] for each in given]
    assert {image.size for image in images} == {(64, 64)}
    assert len({image.tobytes() for image in images}) == 3


def test_it_is_evaluated(run: Run) -> None:
    params = EvaluationParams(
        prompts=["a {pt1}"],
        prior_prompts=["a red cat"],
        images_per_prompt=1,
        sampler=SAMPLER,
        evaluators=(),
        text_image_model=None,
        color_agreement=False,
    )
    ingestion = IngestionParams(bucket=BucketParams(side_px=64))
    sheet, _, _, table, *_ = evaluate(
        run.base_model,
        run.reloaded,
        run.reference,
        params=params,
        ingestion=ingestion,
        device=CPU,
        tracker=Mock(),
    )
    assert sheet.size[0] > 64 and len(table)


def test_the_files_name_their_base_model(run: Run) -> None:
    metadata = read_metadata(run.files["lora/fox-neg.safetensors"])
    architecture, version, prediction, is_v2 = ARCHITECTURES[run.name]
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert metadata["ss_base_model_version"] == version
    assert (metadata["modelspec.prediction_type"], metadata["ss_v2"]) == (prediction, is_v2)


def test_embeddings_have_the_vectors_of_every_text_encoder(run: Run) -> None:
    shapes = {name: tuple(t.shape) for name, t in load(run.files["embeddings/my-fox.safetensors"]).items()}
    width = {"sd1": 16, "sd2-v": 24}.get(run.name)
    assert shapes == ({"emb_params": (2, width)} if width else {"clip_l": (2, 16), "clip_g": (2, 24)})


def test_every_tool_finds_every_layer(run: Run) -> None:
    for name in ("lora/fox.safetensors", "lora/fox-neg.safetensors"):
        modules = {key.partition(".")[0] for key in load(run.files[name])}
        for tool in (a1111_names, comfyui_names, kohya_names):
            assert not modules - tool(run.name), tool.__name__
        entry = run.report["files"][name]
        assert entry["num_layers"] == len(modules)
        assert entry["diffusers"]["takes_all_layers"] and not any(entry["refused_layers"].values())
        assert run.report["files"][name.replace("lora/", "diffusers/")]["diffusers"]["takes_all_layers"]


def test_the_workflow_conditions_as_this_project(run: Run) -> None:
    workflow = json.loads(run.files["comfyui_workflow.json"])
    kinds = {name: node["class_type"] for name, node in workflow.items()}
    is_xl = run.name.startswith("sdxl")
    assert kinds["negative_prompt"] == ("ConditioningZeroOut" if is_xl else "CLIPTextEncode")  # an empty prompt
    assert kinds["positive_prompt"] == "CLIPTextEncode"
    sampling = workflow.get("model_sampling", {}).get("inputs", {})
    assert sampling.get("zsnr") == {"sd2-v": False, "sdxl-v": True}.get(run.name)
    assert workflow["latents"]["inputs"]["width"] == 64


@pytest.mark.parametrize(("clip_skip", "negative_prompt"), [(0, ""), (0, "a my-fox-neg"), (1, "a my-fox-neg")])
def test_the_script_draws_what_the_concept_draws(run: Run, clip_skip: int, negative_prompt: str) -> None:
    concept = with_clip_skip(run.concept, clip_skip)
    export = ExportParams(title="fox", formats=("kohya", "embeddings"), sampler=SAMPLER)
    FileFolderDataset(path=str(run.folder / "export")).save(write_files(run.base_model, concept, export))
    script = import_script(run.folder / "export" / "generate_with_diffusers.py")
    pipe = script.load(run.base_model).to("cpu", torch.float32)
    noise = initial_noise((4, 8, 8), image_generators([3, 4]))
    drawn = script.draw(pipe, "a my-fox", negative_prompt, [3, 4], latents=noise)
    backbone = open_base_model(run.base_model, CPU)
    loaded = attach(backbone, concept, export.strength)
    expected = generate(backbone, loaded, ["a my-fox"] * 2, negative_prompt, [3, 4], export.sampler)
    for image, ours in zip(drawn, expected, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(ours, int)).max() <= 1


def with_clip_skip(concept: Concept, clip_skip: int) -> Concept:
    return dataclasses.replace(concept, metadata=concept.metadata.model_copy(update={"clip_skip": clip_skip}))


def test_clip_skip_has_the_layer_and_the_setting_of_the_other_tools(run: Run) -> None:
    export = ExportParams(title="fox", formats=("kohya", "embeddings"), sampler=SAMPLER)
    files = write_files(run.base_model, with_clip_skip(run.concept, 1), export)
    workflow, readme = json.loads(files["comfyui_workflow.json"]), files["README.txt"].decode()
    is_v1 = run.name == "sd1"
    assert workflow["last_layer"]["inputs"]["stop_at_clip_layer"] == (-2 if is_v1 else -3)
    assert ("Clip skip 2" in readme, "cannot be set" in readme) == (is_v1, not is_v1)


def import_script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_with_diffusers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ["lora", "diffusers"])
def test_what_is_imported_predicts_the_same(run: Run, folder: str) -> None:
    names = [*(f"{folder}/fox{neg}.safetensors" for neg in ("", "-neg"))]
    words = [f"embeddings/my-fox{neg}.safetensors" for neg in ("", "-neg")]
    params = ImportParams(positive=names[:1], negative=names[1:], words={"pt1": words}, class_word="fox")
    files = {name: (lambda file=file: file) for name, file in run.files.items()}
    imported, report = import_concept(run.base_model, files, {}, params)
    assert not report["left_out"]
    backbone = open_base_model(run.base_model, CPU)
    probe = make_probe(backbone)
    ours, theirs = (concept_predictions(backbone, concept, probe) for concept in (run.concept, imported))
    for branch in ours:
        torch.testing.assert_close(theirs[branch], ours[branch], rtol=1e-4, atol=1e-5)
    for encoder in run.encoders:
        part = "words" if encoder == "text_encoder" else f"words_{encoder}"
        assert torch.equal(imported.tensors[f"{part}.positive.pt1"], run.concept.tensors[f"{part}.positive.pt1"])


def test_both_names_of_the_unets_layers_are_read(run: Run) -> None:
    """kohya's trainer writes those of the original code for SDXL, and those of diffusers for other models."""
    other = {f"lora_unet_{old}": f"lora_unet_{new}" for old, new in original_unet(run.name).items()}
    if not run.name.startswith("sdxl"):
        other = {new: old for old, new in other.items()}
    tensors = load(run.files["lora/fox.safetensors"])
    renamed = {
        f"{other.get(key.partition('.')[0], key.partition('.')[0])}.{key.partition('.')[2]}": tensor
        for key, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    outline = load_outline(BaseModelFiles(run.base_model))
    shapes, names = outline.layer_shapes, outline.file_names
    ours, theirs = (read_lora(save(each), "fox", shapes, names).adapter.by_layer() for each in (tensors, renamed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[at].update(), theirs[at].update()) for at in ours)
