"""The export: every file, read back by this project and by diffusers, and drawing with them as the concept draws."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, concept_metadata, generate, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.sd import V1_NAMES
from dreamartist_pipeline.backbones.lora_files import concept_predictions, file_prediction, make_probe
from dreamartist_pipeline.core.concept import Concept, TriggerWord
from dreamartist_pipeline.core.sampling import image_generators, initial_noise
from dreamartist_pipeline.datasets.file_folder import FileFolderDataset
from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import build_concept
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata
from dreamartist_pipeline.interop.toolkit import read_toolkit
from dreamartist_pipeline.params import DeviceParams, ExportParams, SamplerParams, StrengthParams, TrainingParams
from dreamartist_pipeline.pipelines.export import create_pipeline
from dreamartist_pipeline.pipelines.export.nodes import check_export, check_files, write_files
from refusals import says

MakeParams = Callable[..., TrainingParams]
SAMPLER = SamplerParams(scheduler="ddim", num_inference_steps=3, guidance_scale=3.0)
STRENGTH = StrengthParams(positive=0.8, negative=0.5)
EVERYTHING = ExportParams(title="fox", sampler=SAMPLER, strength=STRENGTH)
ATTENTION, TEXT = "re:.*\\.attn.?$", "re:.*self_attn$"
MIXED = [  # several ranks and alphas, a convolution, a shared group, two groups in one layer
    {"lr": 1e-3, "rank": 0.1, "branch": "p", "layers": [ATTENTION, "re:.*resnets.0.conv1$"], "alpha": 2.0},
    {"lr": 1e-3, "rank": 2, "branch": "p", "layers": ["re:.*attn1.to_q$", "re:.*proj_in$"], "alpha": 1.0},
    {"lr": 1e-3, "rank": 3, "branch": "n", "layers": [ATTENTION, "re:.*ff\\.net\\.2$"], "alpha": 0.5},
    {"lr": 1e-3, "rank": 1, "layers": ["re:.*downsamplers.0.conv$", "conv_out", "re:.*time_emb_proj$"], "alpha": 1.0},
]


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))


def make_concept(backbone: Backbone, params: TrainingParams) -> Concept:
    """Return a concept whose adapters and words are far from their start."""
    new = start_concept(backbone, params, 1, 0)
    generator = torch.Generator().manual_seed(1)
    for adapters in new.stacks.values():
        for layer in adapters.layers.values():
            for update in layer.updates:
                torch.nn.init.normal_(update.up, std=0.3, generator=generator)
                if update.bias is not None:
                    torch.nn.init.normal_(update.bias, std=0.3, generator=generator)
    for words in new.words.values():
        for vectors in words.vectors:
            torch.nn.init.normal_(vectors, std=0.5, generator=generator)
    return new.snapshot(concept_metadata(backbone, params, 1))


@pytest.fixture(scope="module")
def concept(backbone: Backbone, make_training_params: MakeParams) -> Concept:
    return make_concept(backbone, make_training_params(lora_unet=MIXED))


@pytest.fixture(scope="module")
def files(tiny_base_model: Path, concept: Concept) -> dict[str, bytes]:
    return write_files(str(tiny_base_model), concept, EVERYTHING)


def planned(concept: Concept) -> PlannedConcept:
    metadata = concept.metadata
    return PlannedConcept(False, metadata.zero_terminal_snr, metadata.lora, tuple(metadata.words))


def export(base_model: Path, concept: Concept, **changes: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    params = ExportParams(**{"title": "fox", **changes})
    check_export(params, planned(concept))  # as the hooks do
    return check_files(str(base_model), concept, write_files(str(base_model), concept, params), params)


# --------------------------------------------------------------------------------------------- what is written


def test_the_export_holds_every_format_and_says_how_to_use_them(files: dict[str, bytes]) -> None:
    assert set(files) == {
        *("lora/fox.safetensors", "lora/fox-neg.safetensors"),
        *("diffusers/fox.safetensors", "diffusers/fox-neg.safetensors"),
        *("embeddings/my-fox.safetensors", "embeddings/my-fox-neg.safetensors"),
        *(f"toolkit/{network}{neg}-3.safetensors" for network in ("unet", "text_encoder") for neg in ("", "-neg")),
        *("toolkit/my-fox.pt", "toolkit/my-fox-neg.pt"),
        *("comfyui_workflow.json", "generate_with_diffusers.py", "README.txt"),
    }


@pytest.mark.parametrize(
    ("file_format", "folder"),
    [("kohya", "lora"), ("peft", "diffusers"), ("toolkit", "toolkit"), ("embeddings", "embeddings")],
)
def test_only_the_chosen_formats_are_written(
    tiny_base_model: Path, concept: Concept, file_format: Any, folder: str
) -> None:
    written = write_files(str(tiny_base_model), concept, ExportParams(title="fox", formats=(file_format,)))
    assert {name.split("/")[0] for name in written if "/" in name} == {folder}
    assert "comfyui_workflow.json" not in written  # it would lack the words, or the LoRAs


def test_the_title_names_files_and_metadata(tiny_base_model: Path, concept: Concept) -> None:
    written = write_files(str(tiny_base_model), concept, ExportParams(title="reineke"))
    assert "lora/reineke-neg.safetensors" in written
    assert read_metadata(written["lora/reineke.safetensors"])["ss_output_name"] == "reineke"
    assert read_metadata(written["lora/reineke.safetensors"])["modelspec.prediction_type"] == "v"


def test_prompts_seed_sampler_and_strengths_reach_the_workflow(tiny_base_model: Path, concept: Concept) -> None:
    params = ExportParams(
        title="fox", prompt="the {pt1}", negative_prompt="bad {pt1}", seed=5, sampler=SAMPLER, strength=STRENGTH
    )
    workflow = json.loads(write_files(str(tiny_base_model), concept, params)["comfyui_workflow.json"])
    assert workflow["positive_prompt"]["inputs"]["text"] == "the embedding:my-fox"
    assert workflow["negative_prompt"]["inputs"]["text"] == "bad embedding:my-fox-neg"
    assert workflow["positive_lora"]["inputs"]["strength_model"] == 0.8
    assert workflow["negative_lora"]["inputs"]["strength_model"] == 0.5
    drawn = workflow["sampler"]["inputs"]
    assert (workflow["noise"]["inputs"]["noise_seed"], drawn["cfg"]) == (5, 3.0)
    assert workflow["solver"]["inputs"]["sampler_name"] == "ddim"
    assert len(workflow["sigmas"]["inputs"]["sigmas"].split(", ")) == 1 + 3
    assert workflow["sampler"]["inputs"]["model"] == ["model_sampling", 0]


def test_the_readme_labels_the_fallback_as_not_equivalent(files: dict[str, bytes]) -> None:
    text = files["README.txt"].decode()
    assert "ComfyUI: equivalent" in text
    (heading,) = [line for line in text.splitlines() if line.startswith("A1111")]
    assert "not equivalent" in heading.lower()
    assert "a my-fox <lora:fox:0.8>" in text
    assert re.search(r"negative prompt:?\s+my-fox-neg$", text, re.MULTILINE)


def readme_of(base_model: Path, concept: Concept, **changes: Any) -> str:
    params = ExportParams(**{"title": "fox", **changes})
    return write_files(str(base_model), concept, params)["README.txt"].decode()


def test_prompts_for_a1111_have_no_weights(tiny_base_model: Path, concept: Concept) -> None:
    text = readme_of(tiny_base_model, concept, prompt=r"a {pt1} (red), [blue] \o/", negative_prompt="(bad)")
    assert r"a my-fox \(red\), \[blue\] \\o/ <lora:fox:1>" in text
    assert r"negative prompt  my-fox-neg, \(bad\)" in text


def test_the_readme_lists_folders_and_requirements(tiny_base_model: Path, concept: Concept) -> None:
    text = readme_of(tiny_base_model, concept)
    assert "lora/*.safetensors to models/loras and embeddings/*.safetensors to models/embeddings" in text
    assert "lora/fox.safetensors to models/Lora and embeddings/*.safetensors to embeddings" in text
    assert "pip install diffusers transformers peft" in text
    assert "ComfyUI 0.7.0" not in text
    assert "ComfyUI 0.7.0" in readme_of(tiny_base_model, concept, sampler=SAMPLER)


def test_the_readme_omits_tools_without_files(tiny_base_model: Path, concept: Concept) -> None:
    text = readme_of(tiny_base_model, concept, formats=("toolkit",))
    assert "A1111" not in text and "ComfyUI" not in text


def test_the_readme_has_the_clip_skip_of_a1111(tiny_base_model: Path, concept: Concept) -> None:
    skipping = dataclasses.replace(concept, metadata=concept.metadata.model_copy(update={"clip_skip": 1}))
    assert "Clip skip 2" in readme_of(tiny_base_model, skipping)
    assert "Clip skip" not in readme_of(tiny_base_model, concept)


def test_the_reason_for_different_images_in_comfyui_is_reported(
    tiny_base_model: Path, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dreamartist_pipeline"):
        kept, report = export(
            tiny_base_model, concept, formats=("kohya", "embeddings"), sampler={"scheduler": "euler_a"}
        )
    reason = "random noise"
    assert reason in report["files"]["comfyui_workflow.json"]["difference"]
    assert reason in kept["README.txt"].decode() and "ComfyUI: equivalent" not in kept["README.txt"].decode()
    assert reason in caplog.text


def test_the_sigmas_are_those_of_the_base_models_spacing(
    tiny_base_model: Path, concept: Concept, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_base_model, tmp_path / "trailing"))
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_spacing": "trailing"}))
    params = ExportParams(title="fox", sampler=SamplerParams(scheduler="euler"))
    first = [
        json.loads(write_files(str(base), concept, params)["comfyui_workflow.json"])["sigmas"]["inputs"]["sigmas"]
        for base in (tiny_base_model, other)
    ]
    assert [round(float(sigmas.split(", ")[0]), 2) for sigmas in first] == [11.03, 14.61]


def test_a_prompt_that_would_lose_its_trigger_word_is_refused(tiny_base_model: Path, concept: Concept) -> None:
    with pytest.raises(InputError, check=says(expected="the trigger words", got="tokens")):
        export(tiny_base_model, concept, formats=("embeddings",), prompt="cat " * 90 + "{pt1}")


def test_other_tools_get_trigger_words_as_they_are_named(tiny_base_model: Path, concept: Concept) -> None:
    params = ExportParams(title="fox", prompt="a my\u2011Fox", negative_prompt="MY\u2013fox-neg")
    files = write_files(str(tiny_base_model), concept, params)
    assert "a my-fox" in files["README.txt"].decode()
    script = files["generate_with_diffusers.py"].decode()
    assert "a my-fox" in script
    assert "my-fox-neg" in script.split("negative_prompt", 1)[1]


def test_an_example_prompt_without_a_trigger_word_is_named(
    tiny_base_model: Path, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    export(tiny_base_model, concept, formats=("embeddings",), prompt="two my-foxes")
    assert any(record.levelname == "WARNING" and "'two my-foxes'" in record.getMessage() for record in caplog.records)


def test_equal_concepts_give_equal_files(tiny_base_model: Path, concept: Concept, files: dict[str, bytes]) -> None:
    assert write_files(str(tiny_base_model), concept, EVERYTHING) == files


# --------------------------------------------------------------------------------------------- reading back


@pytest.mark.parametrize(("dtype", "at_most"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_what_is_read_back_is_the_concept_to_the_dtypes_precision(
    tiny_base_model: Path, concept: Concept, dtype: str, at_most: float
) -> None:
    kept, report = export(tiny_base_model, concept, dtype=dtype)
    assert report["files"].keys() == kept.keys()
    for name in ("lora/fox.safetensors", "lora/fox-neg.safetensors", "diffusers/fox.safetensors"):
        entry = report["files"][name]
        assert entry["update"]["relative_difference"] <= at_most
        assert entry["diffusers"]["max_difference"] <= entry["diffusers"]["limit"]
        assert entry["diffusers"]["effect"] > 100 * entry["diffusers"]["max_difference"] > 0
    dtypes = {tensor.dtype for tensor in load(kept["lora/fox.safetensors"]).values()}
    assert dtypes == {getattr(torch, dtype)}
    assert report["files"]["toolkit/my-fox.pt"]["num_vectors"] == 2


def test_small_updates_can_be_exported_in_float16(
    tiny_base_model: Path, backbone: Backbone, make_training_params: MakeParams
) -> None:
    small = [group | {"alpha": 1e-5} for group in MIXED[:3]]
    concept = make_concept(backbone, make_training_params(lora_unet=small))
    _, report = export(tiny_base_model, concept, dtype="float16", formats=("kohya", "peft", "embeddings"))
    for name in ("lora/fox.safetensors", "diffusers/fox.safetensors"):
        assert report["files"][name]["update"]["relative_difference"] < 6e-4


def test_the_report_lists_the_layers_that_each_tool_ignores(tiny_base_model: Path, concept: Concept) -> None:
    _, report = export(tiny_base_model, concept, formats=("kohya", "peft"))
    refused = report["files"]["lora/fox.safetensors"]["refused_layers"]
    assert refused["ComfyUI"] == []
    assert all(layer.startswith("unet.") for layer in refused["A1111"])  # one residual block a level, unlike SD
    assert refused["A1111"]
    as_peft = report["files"]["diffusers/fox.safetensors"]["refused_layers"]["ComfyUI"]
    assert as_peft and all(".attn" in layer for layer in as_peft)


def test_a_tool_that_ignores_layers_is_logged(
    tiny_base_model: Path, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dreamartist_pipeline"):
        export(tiny_base_model, concept, formats=("kohya",))
    assert any(message.startswith("lora/fox.safetensors: A1111 ") for message in caplog.messages)


def like(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Return the files of the same folder: diffusers takes seconds to load those of others."""
    return {other: file for other, file in files.items() if Path(other).parent == Path(name).parent}


def tampered(file: bytes, ends: str, factor: float) -> bytes:
    tensors = load(file)
    name = sorted(name for name in tensors if name.endswith(ends))[0]
    return save({**tensors, name: tensors[name] * factor})


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("lora/fox.safetensors", "lora_up.weight"),
        ("diffusers/fox-neg.safetensors", "lora_B.weight"),
        ("toolkit/unet-neg-3.safetensors", ".alpha"),
        ("embeddings/my-fox.safetensors", "emb_params"),
    ],
)
def test_a_file_that_differs_from_the_concept_is_refused_by_name(
    tiny_base_model: Path, concept: Concept, files: dict[str, bytes], name: str, ends: str
) -> None:
    wrong = like(files, name) | {name: tampered(files[name], ends, 1.01)}
    with pytest.raises(InputError, check=says(expected=name)):
        check_files(str(tiny_base_model), concept, wrong, EVERYTHING)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("generate_with_diffusers.py", b"def (", "generate_with_diffusers.py"),
        ("comfyui_workflow.json", b'{"a": {"inputs": {"x": ["b", 0]}}}', "'b' in comfyui_workflow.json"),
    ],
)
def test_a_broken_companion_is_refused_by_name(
    tiny_base_model: Path, concept: Concept, files: dict[str, bytes], name: str, content: bytes, expected: str
) -> None:
    with pytest.raises(InputError, check=says(expected=expected)):
        check_files(str(tiny_base_model), concept, files | {name: content}, EVERYTHING)


def test_what_diffusers_predicts_is_compared_too(
    tiny_base_model: Path, concept: Concept, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamartist_pipeline.pipelines.export import checking

    monkeypatch.setattr(checking, "_compare_updates", lambda *_: {})
    files = like(files, "lora/fox.safetensors")
    wrong = files | {"lora/fox-neg.safetensors": files["lora/fox.safetensors"]}
    with pytest.raises(InputError, check=says(expected="lora/fox-neg", remedy="kohya")):
        check_files(str(tiny_base_model), concept, wrong, EVERYTHING)
    wrong = files | {"lora/fox.safetensors": tampered(files["lora/fox.safetensors"], "lora_up.weight", 1.5)}
    with pytest.raises(InputError, check=says(expected="positive branch", got="a difference")):
        check_files(str(tiny_base_model), concept, wrong, EVERYTHING)


def test_a_file_that_diffusers_refuses_is_named(backbone: Backbone) -> None:
    orphan = save({"lora_unet_conv_in.alpha": torch.tensor(1.0)})
    with pytest.raises(InputError, check=says(expected="lora/x", got="ValueError")):
        file_prediction(backbone, orphan, "lora/x", make_probe(backbone))


def test_a_concept_of_another_base_model_is_refused(other_layout: Path, concept: Concept) -> None:
    with pytest.raises(InputError, check=says(got="prediction_type (epsilon, not v_prediction)")):
        export(other_layout, concept, formats=("kohya",))


# --------------------------------------------------------------------------------------------- parts of a concept


@pytest.mark.parametrize(
    ("layers", "file_format", "other"),
    [(("re:.*q_proj$", "re:.*mlp$"), "kohya", "peft"), (("re:.*mlp$",), "peft", "kohya")],
)
def test_where_diffusers_loses_layers_of_one_format_the_script_takes_the_other(
    tiny_base_model: Path,
    backbone: Backbone,
    make_training_params: MakeParams,
    layers: Any,
    file_format: str,
    other: str,
) -> None:
    group = {"lr": 1e-3, "rank": 1, "branch": "p", "layers": layers}
    partial = make_concept(backbone, make_training_params(lora_unet=(), lora_text_encoder=(group,)))
    kept, report = export(tiny_base_model, partial)
    names = {"kohya": "lora/fox.safetensors", "peft": "diffusers/fox.safetensors"}
    assert report["files"][names[file_format]]["diffusers"] == {"takes_all_layers": False}
    assert report["files"][names[other]]["diffusers"]["takes_all_layers"]
    assert names[other] in kept["generate_with_diffusers.py"].decode()
    try:  # the rule holds as long as diffusers really loses them
        loaded = file_prediction(backbone, kept[names[file_format]], "x", make_probe(backbone))
    except InputError:
        return
    assert len(loaded.layers) < report["files"][names[file_format]]["num_layers"]


def test_a_concept_of_words_alone_exports_its_words(
    tiny_base_model: Path, backbone: Backbone, make_training_params: MakeParams
) -> None:
    words = make_concept(backbone, make_training_params(lora_unet=(), lora_text_encoder=()))
    kept, _ = export(tiny_base_model, words)
    assert not [name for name in kept if name.startswith(("lora/", "diffusers/"))]
    workflow = json.loads(kept["comfyui_workflow.json"])
    assert workflow["negative_prompt"]["inputs"]["clip"] == ["base_model", 1]
    with pytest.raises(InputError, check=says(got="export.formats=['kohya']", remedy="embeddings")):
        export(tiny_base_model, words, formats=("kohya",))


def test_a_plain_lora_goes_to_both_branches_and_is_equivalent_in_a1111(
    tiny_base_model: Path, backbone: Backbone, make_training_params: MakeParams
) -> None:
    group = {"lr": 1e-3, "rank": 2, "layers": (ATTENTION,)}
    params = make_training_params(
        guidance_scale="1",
        words={},
        templates=("a {class}",),
        class_word="fox",
        lora_unet=(group,),
        lora_text_encoder=(),
    )
    kept, _ = export(tiny_base_model, make_concept(backbone, params))
    positive, negative = (load(kept[f"lora/fox{suffix}.safetensors"]) for suffix in ("", "-neg"))
    assert all(torch.equal(tensor, negative[name]) for name, tensor in positive.items())
    text = kept["README.txt"].decode()
    assert "not equivalent" not in text.lower()
    assert "a fox <lora:fox:1>" in text
    unequal = readme_of(tiny_base_model, make_concept(backbone, params), strength=STRENGTH)
    assert "a fox <lora:fox:0.8>" in unequal and "not equivalent" in unequal.lower()


@pytest.mark.parametrize("start", [{"svd_init": True}, {"orthogonal_init": "random"}], ids=["svd", "orthogonal"])
def test_a_concept_that_started_by_svd_exports_as_any_other(
    tiny_base_model: Path, backbone: Backbone, make_training_params: MakeParams, start: dict[str, object]
) -> None:
    groups = [group | start for group in MIXED[:3]]
    kept, report = export(tiny_base_model, make_concept(backbone, make_training_params(lora_unet=groups)))
    assert report["files"]["lora/fox.safetensors"]["diffusers"]["takes_all_layers"]
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q.lora_down.weight"
    assert len(load(kept["lora/fox-neg.safetensors"])[name]) == 2 * 3


def test_a_concept_with_biases_is_refused_in_the_kohya_format_and_drawn_by_the_script(
    tiny_base_model: Path, backbone: Backbone, make_training_params: MakeParams, tmp_path: Path
) -> None:
    groups = [group | {"bias": True} for group in MIXED[:3]]
    text = [{"lr": 1e-3, "rank": 1, "branch": branch, "layers": [TEXT], "bias": branch == "p"} for branch in "pn"]
    biased = make_concept(backbone, make_training_params(lora_unet=groups, lora_text_encoder=text))
    refused = says(got="kohya", remedy="export.formats=[peft,toolkit,embeddings]")
    with pytest.raises(InputError, check=refused):
        check_export(ExportParams(title="fox"), planned(biased))
    with pytest.raises(InputError, check=refused):  # of an import in the same run, which is not checked early
        write_files(str(tiny_base_model), biased, ExportParams(title="fox"))
    formats = ("peft", "toolkit", "embeddings")
    kept, report = export(tiny_base_model, biased, **EVERYTHING.model_dump() | {"formats": formats})
    assert not [name for name in kept if name.startswith("lora/") or name.endswith(".json")]
    assert report["files"]["diffusers/fox.safetensors"]["diffusers"]["takes_all_layers"]
    assert_script_draws(tiny_base_model, backbone, biased, kept, tmp_path)
    wrong = kept | {"toolkit/unet-3.safetensors": tampered(kept["toolkit/unet-3.safetensors"], ".bias", 1.01)}
    with pytest.raises(InputError, check=says(expected="toolkit/unet-3.safetensors", got="a relative difference")):
        check_files(str(tiny_base_model), biased, wrong, ExportParams(title="fox", formats=formats))


# --------------------------------------------------------------------------------------------- used elsewhere


def test_the_toolkits_files_come_back_as_a_concept_that_draws_the_same(
    backbone: Backbone, concept: Concept, files: dict[str, bytes]
) -> None:
    members = {name.removeprefix("toolkit/"): file for name, file in files.items() if name.startswith("toolkit/")}
    modules = {
        "unet": [name for name, _ in backbone.unet.named_modules()],
        "text_encoder": [name for name, _ in backbone.text_encoder.named_modules()],
    }
    adapters, vectors = read_toolkit(members, modules, V1_NAMES)
    words = [
        TriggerWord("my-fox", "pt1", "positive", {"text_encoder": vectors["my-fox"]}),
        TriggerWord("my-fox-neg", "pt1", "negative", {"text_encoder": vectors["my-fox-neg"]}),
    ]
    built = build_concept(adapters, words, backbone.identity)
    probe = make_probe(backbone)
    expected, got = concept_predictions(backbone, concept, probe), concept_predictions(backbone, built, probe)
    for branch, prediction in expected.items():
        torch.testing.assert_close(got[branch], prediction, rtol=1e-5, atol=1e-5)
    assert attach(backbone, built, StrengthParams()).trigger_words == {"pt1": ("my-fox", "my-fox-neg")}


def import_script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_with_diffusers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_the_script_draws_in_plain_diffusers_what_the_concept_draws(
    tiny_base_model: Path, backbone: Backbone, concept: Concept, tmp_path: Path, clip_skip: int
) -> None:
    concept = dataclasses.replace(concept, metadata=concept.metadata.model_copy(update={"clip_skip": clip_skip}))
    files, _ = export(tiny_base_model, concept, **EVERYTHING.model_dump())
    assert_script_draws(tiny_base_model, backbone, concept, files, tmp_path)


def test_the_script_draws_trigger_words_with_capitals(
    tiny_base_model: Path, backbone: Backbone, concept: Concept, tmp_path: Path
) -> None:
    words = {"pt1": ("my-Fox", "my-Fox-neg")}
    concept = dataclasses.replace(concept, metadata=concept.metadata.model_copy(update={"words": words}))
    files = write_files(str(tiny_base_model), concept, EVERYTHING)
    assert_script_draws(tiny_base_model, backbone, concept, files, tmp_path, prompt="A MY-FOX, background")


def assert_script_draws(
    tiny_base_model: Path,
    backbone: Backbone,
    concept: Concept,
    files: dict[str, bytes],
    tmp_path: Path,
    prompt: str = "a my-fox, background",
) -> None:
    """Draw with the exported script and with the concept, and compare the images."""
    FileFolderDataset(path=str(tmp_path / "export")).save(files)
    script = import_script(tmp_path / "export" / "generate_with_diffusers.py")
    seeds = [3, 4]
    noise = initial_noise((4, 8, 8), image_generators(seeds))
    pipe = script.load(str(tiny_base_model)).to("cpu", torch.float32)
    drawn = script.draw(pipe, prompt, "a red cat", seeds, latents=noise)
    loaded = attach(backbone, concept, STRENGTH)
    expected = generate(backbone, loaded, [prompt] * 2, "a red cat", seeds, SAMPLER)
    plain = generate(backbone, attach(backbone, None, STRENGTH), [prompt] * 2, "a red cat", seeds, SAMPLER)
    for image, with_concept, base in zip(drawn, expected, plain, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(with_concept, int)).max() <= 1
        assert np.abs(np.asarray(base, int) - np.asarray(with_concept, int)).max() > 20


def test_the_script_draws_with_a_scheduler_of_diffusers_and_its_options(
    tiny_base_model: Path, backbone: Backbone, concept: Concept, tmp_path: Path
) -> None:
    options = {"use_karras_sigmas": True}
    sampler = SAMPLER.model_copy(update={"scheduler": "HeunDiscreteScheduler", "scheduler_options": options})
    params = ExportParams(title="fox", formats=("kohya", "embeddings", "peft"), sampler=sampler)
    check_export(params, planned(concept))
    files = write_files(str(tiny_base_model), concept, params)
    FileFolderDataset(path=str(tmp_path / "export")).save(files)
    script = import_script(tmp_path / "export" / "generate_with_diffusers.py")
    pipe = script.load(str(tiny_base_model)).to("cpu", torch.float32)
    (drawn,) = script.draw(pipe, "a my-fox", "", [3])
    loaded = attach(backbone, concept, StrengthParams())
    (expected,) = generate(backbone, loaded, ["a my-fox"], "", [3], sampler)
    plain = sampler.model_copy(update={"scheduler_options": {}})
    (without,) = generate(backbone, loaded, ["a my-fox"], "", [3], plain)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1
    assert np.abs(np.asarray(without).astype(int) - np.asarray(expected)).max() > 1


def test_a_scheduler_that_comfyui_does_not_have_is_refused(concept: Concept) -> None:
    params = ExportParams(title="fox", sampler=SamplerParams(scheduler="PNDMScheduler"))
    with pytest.raises(InputError, check=says(expected="ComfyUI", got="PNDMScheduler")):
        check_export(params, planned(concept))


def test_scheduler_options_are_checked_and_strengths_logged(
    tiny_base_model: Path, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = SamplerParams(scheduler_options={"nonsense": 1})
    with pytest.raises(InputError, check=says(expected="scheduler_options", got="'nonsense'")):
        check_export(ExportParams(title="fox", sampler=wrong), planned(concept))
    with caplog.at_level(logging.INFO):
        write_files(str(tiny_base_model), concept, EVERYTHING)
    assert "Adapter strengths in the workflow and the script: 0.8 positive, 0.5 negative." in caplog.messages


def test_the_script_draws_in_one_dtype_whatever_the_model_is_stored_in(
    tiny_base_model: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    FileFolderDataset(path=str(tmp_path / "export")).save(files)
    half = shutil.copytree(tiny_base_model, tmp_path / "half")
    for weights in half.rglob("*.safetensors"):
        weights.write_bytes(save({name: tensor.half() for name, tensor in load(weights.read_bytes()).items()}))
    pipe = import_script(tmp_path / "export" / "generate_with_diffusers.py").load(str(half))
    assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {
        torch.float16 if torch.cuda.is_available() else torch.float32
    }


def test_the_script_draws_in_batches_from_the_seed_on(
    tiny_base_model: Path, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = SAMPLER.model_copy(update={"batch_size": 3})
    params = ExportParams(title="fox", prompt="the {pt1}", negative_prompt="bad {pt1}", seed=5, sampler=sampler)
    file = tmp_path / "script.py"
    file.write_bytes(write_files(str(tiny_base_model), concept, params)["generate_with_diffusers.py"])
    script, drawn = import_script(file), []
    monkeypatch.setattr(script, "load", lambda base_model: base_model)
    monkeypatch.setattr(
        script, "draw", lambda *given: drawn.append(given) or [Image.new("RGB", (8, 8))] * len(given[3])
    )
    monkeypatch.chdir(tmp_path)
    script.main("MODEL")
    assert drawn == [("MODEL", "the my-fox", "bad my-fox-neg", batch) for batch in (range(5, 8), range(8, 9))]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"image_{seed}.png" for seed in (5, 6, 7, 8)]


def test_the_pipeline_keeps_files_and_report() -> None:
    assert create_pipeline().outputs() == {"exported_files", "export_report"}


# --------------------------------------------------------------------------------------------- recommended settings


def recommended_for(concept_sha256: str) -> dict[str, Any]:
    return {
        "strength": {"positive": 0.6, "negative": 0.25},
        "guidance_scale": 2.0,
        "concept_sha256": concept_sha256,
        "reasons": ["strengths: the highest fidelity", "guidance scale: as configured"],
        "fidelity": 0.8,
        "agreement": None,
        "copying": None,
        "num_images": 4,
    }


def test_recommended_settings_are_stated_and_used_on_request(tiny_base_model: Path, concept: Concept) -> None:
    recommended = recommended_for(concept.sha256())
    for asked, strength, guidance in ((False, 0.8, 3.0), (True, 0.6, 2.0)):
        params = ExportParams(title="fox", sampler=SAMPLER, strength=STRENGTH, recommended=asked)
        written = write_files(str(tiny_base_model), concept, params, recommended_settings=recommended)
        check_files(str(tiny_base_model), concept, written, params, recommended_settings=recommended)
        workflow = json.loads(written["comfyui_workflow.json"])
        assert workflow["positive_lora"]["inputs"]["strength_model"] == strength
        assert workflow["sampler"]["inputs"]["cfg"] == guidance
        text = written["README.txt"].decode()
        assert "LoRA strength 0.6 positive, 0.25 negative; guidance scale (CFG) 2" in text
        assert ("export.recommended=true" in text) is not asked
        hint = read_metadata(written["lora/fox.safetensors"])["modelspec.usage_hint"]
        assert "0.6 positive, 0.25 negative" in hint


def test_recommended_settings_of_another_concept_are_not_stated(tiny_base_model: Path, concept: Concept) -> None:
    params, recommended = ExportParams(title="fox"), recommended_for("of another concept")
    written = write_files(str(tiny_base_model), concept, params, recommended_settings=recommended)
    assert "Recommended" not in written["README.txt"].decode()
    assert "modelspec.usage_hint" not in read_metadata(written["lora/fox.safetensors"])
