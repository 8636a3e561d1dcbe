"""The import: files of other tools become a concept, and invalid ones are refused without loading weights."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from pydantic import ValidationError

from concept_bytes import concept_bytes
from dreamartist_pipeline.api import open_base_model, read_toolkit_concept
from dreamartist_pipeline.backbones.concepts import attach, concept_metadata, generate, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.cli import parse_params
from dreamartist_pipeline.cli import run as run_command
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.datasets.user_files import UserFilesDataset, folder_files
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import branch_adapter
from dreamartist_pipeline.interop.safetensors_bytes import write_tensors
from dreamartist_pipeline.interop.word_files import read_embedding
from dreamartist_pipeline.params import (
    DeviceParams,
    ExportParams,
    ImportParams,
    SamplerParams,
    StrengthParams,
    TrainingParams,
)
from dreamartist_pipeline.pipelines.export.nodes import write_files
from dreamartist_pipeline.pipelines.importing import create_pipeline
from dreamartist_pipeline.pipelines.importing.nodes import import_concept
from dreamartist_pipeline.pipelines.training.nodes import check_training
from refusals import says

PROJECT = Path(__file__).resolve().parents[2]
SAMPLER = SamplerParams(scheduler="ddim", num_inference_steps=2, guidance_scale=3.0)
TEXT_LAYERS = ["mlp.fc1", "mlp.fc2", *(f"self_attn.{part}_proj" for part in ("k", "out", "q", "v"))]
PAIR: dict[str, Any] = {
    "positive": "lora/fox.safetensors",
    "negative": "lora/fox-neg.safetensors",
    "words": {"pt1": ["embeddings/my-fox.safetensors", "embeddings/my-fox-neg.safetensors"]},
}


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return open_base_model(tiny_base_model)


@pytest.fixture(scope="module")
def concept(backbone: Backbone, make_training_params: Callable[..., TrainingParams]) -> Concept:
    """A concept whose adapters and words are far from their start."""
    params = make_training_params()
    concept = start_concept(backbone, params, 1, 0).snapshot(concept_metadata(backbone, params, 1))
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in concept.tensors.items()}
    return Concept(tensors, concept.metadata)


@pytest.fixture(scope="module")
def folder(concept: Concept, tiny_base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The concept's export: what a user has."""
    folder = tmp_path_factory.mktemp("export")
    for name, file in write_files(str(tiny_base_model), concept, ExportParams(title="fox")).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(file)
    return folder


@pytest.fixture(autouse=True)
def _no_weight_is_loaded(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)


@pytest.fixture
def run(tiny_base_model: Path, folder: Path) -> Callable[..., tuple[Concept, dict[str, Any]]]:
    def run(**values: Any) -> tuple[Concept, dict[str, Any]]:
        params = ImportParams(**values)
        named = [params.positive, params.negative, params.words]
        files = UserFilesDataset(path=str(folder), files=named).load()
        in_folder = {} if params.toolkit is None else folder_files(folder / params.toolkit)
        return import_concept(str(tiny_base_model), files, in_folder, params)

    return run


Run = Callable[..., tuple[Concept, dict[str, Any]]]


def draw(backbone: Backbone, concept: Concept, prompt: str = "a my-fox") -> torch.Tensor:
    loaded = attach(backbone, concept, StrengthParams(positive=0.8, negative=0.65))
    (image,) = generate(backbone, loaded, [prompt], "a red cat", [1], SAMPLER)
    return torch.tensor(list(image.tobytes()), dtype=torch.int32)


# --------------------------------------------------------------------------------------------- a concept


@pytest.mark.parametrize(
    "changes", [{}, {"positive": "diffusers/fox.safetensors", "negative": "diffusers/fox-neg.safetensors"}]
)
def test_an_exported_pair_draws_as_the_concept_does(
    run: Run, backbone: Backbone, concept: Concept, changes: dict[str, str]
) -> None:
    imported, _ = run(**PAIR | changes)
    assert (draw(backbone, imported) - draw(backbone, concept)).abs().max() <= 1
    assert imported.metadata.words == {"pt1": ("my-fox", "my-fox-neg")}
    assert imported.metadata.num_branches == 2


def test_a_toolkits_folder_is_the_concept_that_the_python_call_reads(
    run: Run, backbone: Backbone, folder: Path
) -> None:
    imported, report = run(toolkit="toolkit")
    expected = read_toolkit_concept(backbone, folder / "toolkit")
    assert imported.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(imported.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert imported.metadata.num_steps == 3
    assert {source["holds"] for source in report["sources"]} == {
        "adapters, HCP-Diffusion",
        "positive word my-fox",
        "negative word my-fox-neg",
    }


def test_a_step_of_the_toolkits_folder_can_be_named(run: Run) -> None:
    with pytest.raises(InputError, check=says(expected="step 9", got="3")):
        run(toolkit="toolkit", step=9)


def test_one_lora_alone_acts_on_both_branches_and_is_logged(
    run: Run, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        imported, report = run(positive="lora/fox.safetensors")
    assert imported.metadata.num_branches == 1
    assert report["adapters"].keys() == {"shared"}
    assert "import.positive_acts_on" in report["notes"][0]
    assert report["notes"][0] in caplog.text
    expected = branch_adapter(concept, "positive").by_layer()
    for branch in ("positive", "negative"):
        layers = branch_adapter(imported, branch).by_layer()
        assert layers.keys() == expected.keys()
        for at, factors in layers.items():
            torch.testing.assert_close(factors.update(), expected[at].update(), rtol=1e-5, atol=1e-6)


def test_a_positive_lora_may_act_on_the_positive_branch_alone(run: Run) -> None:
    imported, report = run(positive="lora/fox.safetensors", positive_acts_on="positive")
    assert branch_adapter(imported, "negative").num_layers == 0
    assert report["adapters"].keys() == {"positive"}
    (note,) = report["notes"]
    assert "negative branch" in note


def test_a_positive_half_of_a_toolkits_folder_is_the_same_concept_by_both_ways(
    run: Run, backbone: Backbone, folder: Path
) -> None:
    (folder / "half").mkdir()
    for name in ("unet-3.safetensors", "text_encoder-3.safetensors"):
        shutil.copy(folder / "toolkit" / name, folder / "half")
    for options, branch in (({}, "shared"), ({"positive_acts_on": "positive"}, "positive")):
        imported, report = run(toolkit="half", **options)
        concept = read_toolkit_concept(backbone, folder / "half", **options)
        assert concept.metadata == imported.metadata
        assert concept.tensors.keys() == imported.tensors.keys()
        assert report["adapters"].keys() == {branch}


def test_an_embedding_alone_is_a_concept(run: Run, backbone: Backbone, concept: Concept) -> None:
    imported, report = run(words={"pt1": "toolkit/my-fox.pt"})
    assert list(imported.tensors) == ["words.positive.pt1"]
    assert report["words"] == [{"slot": "pt1", "branch": "positive", "name": "my-fox", "vectors": 2}]
    assert (draw(backbone, imported, "a my-fox") != draw(backbone, imported, "a red dog")).any()


def test_a_word_of_its_own_length_may_stand_by_itself_beside_a_pair(
    run: Run, backbone: Backbone, folder: Path, tiny_base_model: Path
) -> None:
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    (folder / "bad-hands-5.safetensors").write_bytes(write_tensors({"emb_params": vectors}, {}))
    imported, report = run(**PAIR | {"words": PAIR["words"] | {"quality": "bad-hands-5.safetensors"}})
    assert [word["vectors"] for word in report["words"]] == [2, 3, 5]
    loaded = attach(backbone, imported, StrengthParams())
    assert {word.name: word.num_vectors for word in loaded.prompts.words} == {
        "my-fox": 2,
        "my-fox-neg": 3,
        "bad-hands-5": 5,
    }
    assert torch.equal(draw(backbone, imported), draw(backbone, run(**PAIR)[0]))
    assert (draw(backbone, imported, "a my-fox, bad-hands-5") != draw(backbone, imported)).any()
    exported = write_files(str(tiny_base_model), imported, ExportParams(title="fox"))
    assert torch.equal(read_embedding(exported["embeddings/bad-hands-5.safetensors"], "x.safetensors"), vectors)


def test_what_clip_skip_leaves_out_is_left_out_of_the_concept_and_reported(
    run: Run, backbone: Backbone, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        imported, report = run(**PAIR, clip_skip=1)
    layers = [f"encoder.layers.1.{name}" for name in TEXT_LAYERS]
    assert report["left_out"] == {"positive": layers, "negative": layers}
    assert not [name for name in imported.tensors if "encoder.layers.1" in name]
    note = report["notes"][0]
    assert note.startswith("6 ") and "positive" in note and "clip_skip 1" in note and note in caplog.text
    everything = Concept(concept.tensors, concept.metadata.model_copy(update={"clip_skip": 1}))
    assert (draw(backbone, imported) - draw(backbone, everything)).abs().max() <= 1
    assert run(**PAIR)[1]["left_out"] == {}


def test_a_concept_with_clip_skip_is_a_start(
    run: Run, tiny_base_model: Path, make_training_params: Callable[..., TrainingParams], tmp_path: Path
) -> None:
    imported, _ = run(**PAIR, clip_skip=1)
    file = tmp_path / "concept.safetensors"
    file.write_bytes(concept_bytes(imported))
    params = make_training_params(clip_skip=1, start_from=str(file))
    plan = check_training(str(tiny_base_model), params, "", DeviceParams(device="cpu"), {str(file): file.read_bytes})
    assert plan["start"]["taken_over"]["text_encoder.0.positive"] == 6


def test_a_lora_of_which_clip_skip_leaves_nothing_is_refused(run: Run, folder: Path) -> None:
    name = "lora_te_text_model_encoder_layers_1_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 32), f"{name}.lora_up.weight": torch.ones(96, 1)}
    (folder / "last.safetensors").write_bytes(write_tensors(tensors, {}))
    run(positive="last.safetensors")
    with pytest.raises(InputError, check=says(got="clip_skip", remedy="clip_skip")):
        run(positive="last.safetensors", clip_skip=1)
    _, report = run(positive="lora/fox.safetensors", negative="last.safetensors", clip_skip=1)
    assert report["adapters"].keys() == {"positive"}  # the positive LoRA of a pair does not act on both


def test_several_files_of_one_branch_add_up(run: Run, concept: Concept) -> None:
    imported, _ = run(positive=["lora/fox.safetensors", "lora/fox-neg.safetensors"])
    layers = branch_adapter(imported, "positive").by_layer()
    positive, negative = (branch_adapter(concept, branch).by_layer() for branch in ("positive", "negative"))
    for at, factors in layers.items():
        torch.testing.assert_close(
            factors.update(), positive[at].update() + negative[at].update(), rtol=1e-5, atol=1e-5
        )


def test_names_class_word_and_clip_skip_are_those_given(run: Run) -> None:
    names = {"pt1": ("my-own", "my-own-neg")}
    imported, _ = run(**PAIR, names=names, class_word="fox", clip_skip=1)
    assert imported.metadata.words == names
    assert (imported.metadata.class_word, imported.metadata.clip_skip) == ("fox", 1)


def test_the_report_counts_and_names_the_files(run: Run, folder: Path, tiny_base_model: Path) -> None:
    imported, report = run(**PAIR)
    assert json.loads(json.dumps(report)) == report
    assert report["base_model"]["name"] == tiny_base_model.name
    text = report["adapters"]["negative"]["text_encoder"]
    assert text == {"layers": 12, "ranks": [1], "parameters": 2 * (4 * 64 + 2 * 128)}
    sha256 = hashlib.sha256((folder / "lora/fox.safetensors").read_bytes()).hexdigest()
    assert report["sources"][0] == {"file": "fox.safetensors", "sha256": sha256, "holds": "positive LoRA, kohya"}
    assert imported.metadata.imported_from[0] == ("fox.safetensors", sha256)


def test_every_documented_command_is_a_valid_import() -> None:
    documented = re.findall(r"`(import\.[\w.]+=[^`]+)`", (PROJECT / "docs/import.md").read_text())
    assert len(documented) > 8
    for text in documented:
        values = parse_params(click.Context(run_command), run_command.params[0], text)["import"]
        if "names" in values:
            values["words"] = values["names"]  # named beside their files
        if "step" in values:
            values["toolkit"] = "ckpts"
        ImportParams.model_validate(values)


# --------------------------------------------------------------------------------------------- refusals


def test_nothing_to_import_is_refused(run: Run) -> None:
    with pytest.raises(InputError, check=says(got="none", remedy="import.positive=")):
        run()


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"positive": "README.txt"}, {"expected": "README.txt"}),
        ({"positive": "embeddings/my-fox.safetensors"}, {"got": "an embedding", "remedy": "import.words"}),
        ({"words": {"pt1": "lora/fox.safetensors"}}, {"expected": "[n, D] in fox.safetensors"}),
        ({"words": {"pt1": "toolkit/my-fox.pt"}, "names": {"pt1": "cat"}}, {"got": "'cat'", "remedy": "my-cat"}),
        (
            {"words": {"pt1": ["toolkit/my-fox.pt", "toolkit/my-fox-neg.pt"]}, "names": {"pt1": ["my-x", "My-X"]}},
            {"got": "'my-x' twice", "remedy": "import.names.pt1="},
        ),
        (
            {"words": {"pt1": "toolkit/my-fox.pt"}, "names": {"pt1": "bad hands"}},
            {"got": "'bad hands'", "remedy": "import.names.pt1=bad-hands"},
        ),
        (
            {"words": {"pt1": "toolkit/my-fox.pt"}, "names": {"pt1": "my{cat}"}},
            {"got": "'my{cat}'", "remedy": "import.names.pt1=my-cat"},
        ),
        ({"toolkit": "lora"}, {"expected": "STEP.safetensors", "got": "fox-neg.safetensors"}),
        ({**PAIR, "clip_skip": 2}, {"expected": "clip_skip", "got": "2"}),
    ],
)
def test_a_wrong_file_is_refused(run: Run, values: dict[str, Any], parts: dict[str, str]) -> None:
    with pytest.raises(InputError, check=says(**parts)):
        run(**values)


def test_a_lora_of_another_base_model_is_refused_by_layer(run: Run, folder: Path) -> None:
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    wide = {f"unet.{layer}.lora_A.weight": torch.ones(2, 768), f"unet.{layer}.lora_B.weight": torch.ones(320, 2)}
    (folder / "wide.safetensors").write_bytes(write_tensors(wide, {}))
    with pytest.raises(InputError, check=says(got=f"unet.{layer} is (2, 768) and (320, 2)", remedy="base_model")):
        run(positive="wide.safetensors")


def test_an_embedding_of_another_width_or_longer_than_a_prompt_is_refused(run: Run, folder: Path) -> None:
    for name, shape in (("wide", (1, 768)), ("long", (23, 32)), ("empty", (0, 32))):
        (folder / f"my-{name}.safetensors").write_bytes(write_tensors({"emb_params": torch.ones(shape)}, {}))
    with pytest.raises(InputError, check=says(expected="32 for 'my-wide'", got="768")):
        run(words={"pt1": "my-wide.safetensors"})
    with pytest.raises(InputError, check=says(expected="1 to 22 vectors for 'my-long'", got="23")):
        run(words={"pt1": "my-long.safetensors"})
    with pytest.raises(InputError, check=says(expected="1 to 22 vectors for 'my-empty'", got="0")):
        run(words={"pt1": "my-empty.safetensors"})


def test_an_embedding_with_numbers_that_are_not_finite_is_refused(run: Run, folder: Path) -> None:
    for name, number in (("nan", float("nan")), ("inf", float("inf"))):
        vectors = torch.cat([torch.ones(2, 31), torch.full((2, 1), number)], dim=1)
        (folder / f"my-{name}.safetensors").write_bytes(write_tensors({"emb_params": vectors}, {}))
        with pytest.raises(InputError, check=says(expected=f"finite vectors for 'my-{name}'")):
            run(words={"pt1": f"my-{name}.safetensors"})


def test_weights_in_the_class_word_are_refused() -> None:
    with pytest.raises(ValidationError, match="class_word"):
        ImportParams(class_word="{cat:1.2}")


def test_names_for_a_toolkits_folder_without_words_are_refused(run: Run, folder: Path) -> None:
    (folder / "wordless").mkdir()
    shutil.copy(folder / "toolkit/unet-3.safetensors", folder / "wordless")
    with pytest.raises(InputError, check=says(expected="['my-x']", got="[]", remedy="import.names")):
        run(toolkit="wordless", names={"pt1": "my-x"})


@pytest.mark.parametrize("file", ["learned_embeds.safetensors", "learned_embeds-steps-500.safetensors"])
def test_the_word_inside_a_file_names_it_where_diffusers_calls_all_files_alike(
    run: Run, folder: Path, file: str
) -> None:
    (folder / file).write_bytes(write_tensors({"<cat-toy>": torch.ones(1, 32)}, {}))
    imported, report = run(words={"pt1": file})
    assert imported.metadata.words["pt1"][0] == "<cat-toy>"
    (note,) = report["notes"]
    assert "<cat-toy>" in note and file in note and "import.names.pt1" in note


def test_the_word_inside_a_file_is_offered_where_the_file_has_a_name_of_its_own(run: Run, folder: Path) -> None:
    (folder / "my-toy.safetensors").write_bytes(write_tensors({"<cat-toy>": torch.ones(1, 32)}, {}))
    imported, report = run(words={"pt1": "my-toy.safetensors"})
    assert imported.metadata.words["pt1"][0] == "my-toy"
    assert "import.names.pt1='<cat-toy>'" in report["notes"][0]
    imported, report = run(words={"pt1": "my-toy.safetensors"}, names={"pt1": "<cat-toy>"})
    assert imported.metadata.words["pt1"][0] == "<cat-toy>"
    assert report["notes"] == []


def test_a_word_that_the_base_model_knows_is_not_offered(run: Run, folder: Path) -> None:
    (folder / "a1111.pt").write_bytes(write_tensors({"cat": torch.ones(1, 32)}, {}))
    (note,) = run(words={"pt1": "a1111.pt"})[1]["notes"]
    assert "'cat'" in note and "import.names" not in note
    with pytest.raises(InputError, check=says(got="'cat'", remedy="'my-cat' (import.names.pt1)")):
        run(words={"pt1": "a1111.pt"}, names={"pt1": "cat"})


def test_what_is_noted_of_a_lora_stands_in_the_report_and_the_log(
    run: Run, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {f"{name}.lora_down.weight": torch.ones(2, 24), f"{name}.lora_up.weight": torch.ones(24, 2)}
    file = write_tensors(factors | {f"{name}.alpha": torch.tensor(0.5)}, {})
    (folder / "converted.safetensors").write_bytes(file)
    with caplog.at_level(logging.INFO):
        _, report = run(positive="converted.safetensors")
    assert "--auto_scale_alpha" in report["notes"][-1]
    assert report["notes"][-1] in caplog.text


def test_the_usual_clip_skip_of_an_anime_model_is_suggested(tiny_base_model: Path, tmp_path: Path) -> None:
    base_model = shutil.copytree(tiny_base_model, tmp_path / "anything-v5")
    (tmp_path / "my-toy.safetensors").write_bytes(write_tensors({"emb_params": torch.ones(1, 32)}, {}))
    files = UserFilesDataset(path=str(tmp_path), files=["my-toy.safetensors"]).load()
    for clip_skip, hints in ((0, 1), (1, 0)):
        params = ImportParams(words={"pt1": "my-toy.safetensors"}, clip_skip=clip_skip)
        _, report = import_concept(str(base_model), files, {}, params)
        assert sum("import.clip_skip=1" in note for note in report["notes"]) == hints


def test_the_pipeline_gives_a_concept_and_a_report() -> None:
    assert create_pipeline().all_outputs() == {"concept", "import_report"}
