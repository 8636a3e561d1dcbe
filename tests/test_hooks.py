"""Checks before a run, its record, and its closing summary."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import (
    ConfigurationHooks,
    RunRecordHooks,
    build_parameters,
    check_environment,
    check_names,
    check_picture_is_named,
    check_subject,
    flatten,
    git_tags,
    look_at_it,
    number_lists,
    run_name,
    written_files,
)
from dreamartist_pipeline.params import (
    DeviceParams,
    EvaluationParams,
    ExportParams,
    GenerateParams,
    ImportParams,
    PromptsParams,
    RegularizationParams,
    ResolvedGroup,
)
from dreamartist_pipeline.pipeline_registry import register_pipelines

LORA = {"lr": 1e-3, "rank": 4, "layers": ["re:.*attn"]}


def training(**changes: Any) -> dict[str, Any]:
    return {"training": {"num_steps": 2, "lora_unet": [LORA | {"branch": "p"}], "guidance_scale": "1.0", **changes}}


def test_an_unknown_section_on_the_command_line_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match="got 'trainign' from --params; did you mean 'training'"):
        check_names(["trainign"], origin="--params")


def test_settings_and_sections_are_known() -> None:
    check_names(["subject", "image", "training", "device"], origin="--params")


def test_a_files_own_variables_are_not_parameters() -> None:
    assert build_parameters({"_subject": "fox", "prompts": {"num_prompts": 3}}) == {
        "prompts": PromptsParams(num_prompts=3)
    }


def test_variables_cannot_come_from_the_command_line() -> None:
    with pytest.raises(InputError, match="got '_methods'"):
        check_names(["_methods"], origin="--params")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (training(num_stepz=1), r"training\.num_stepz: there is no such key; did you mean 'num_steps'"),
        (training(loss={"snr_gama": 1}), r"training\.loss\.snr_gama: .* did you mean 'snr_gamma'"),
        (training(lora_unet=[LORA | {"rnk": 1}]), r"training\.lora_unet\.0\.rnk: .* did you mean 'rank'"),
        (training(lora_unet=[LORA | {"rank": 0}]), r"training\.lora_unet\.0\.rank: .*at least 1, got 0"),
        (training(words={"lr": -1}), r"training\.words\.lr: .*greater than 0; got -1"),
        (training(words={"names": {"pt1": ["a", "a"]}}), "same trigger word 'a' in both branches"),
        ({"device": {"device": "gpu"}}, r"device\.device: .*'auto', 'cpu' or 'cuda'; got 'gpu'"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_full_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_parameters(parameters)


def test_all_wrong_parameters_are_reported_at_once() -> None:
    with pytest.raises(InputError) as raised:
        build_parameters(training(num_steps=-1) | {"device": {"dtype": "int8"}, "prompts": {"num_prompts": -1}})
    for name in ("training.num_steps", "device.dtype", "prompts.num_prompts"):
        assert name in str(raised.value)


@pytest.mark.parametrize("subject", ["my cat", "../x", "", "-x", "a/b", None])
def test_a_subject_that_cannot_name_a_folder_is_refused(subject: object) -> None:
    with pytest.raises(InputError, match="expected a subject's name"):
        check_subject(subject)


@pytest.mark.parametrize("subject", ["fox", "my-cat_2.b", 42])
def test_an_ordinary_subject_is_accepted(subject: object) -> None:
    check_subject(subject)


def test_a_picture_without_a_subject_is_refused() -> None:
    with pytest.raises(InputError, match="got only image=cat.jpg; add subject=NAME"):
        check_picture_is_named({"image": "cat.jpg"})
    check_picture_is_named({"image": "cat.jpg", "subject": "cat"})


def test_a_missing_input_is_found_before_the_run(tmp_path: Path) -> None:
    catalog = DataCatalog({"concept": ConceptDataset(filepath=str(tmp_path / "concept.safetensors"))})
    pipeline = Pipeline([node(lambda concept: concept, "concept", "images", name="generate")])
    with pytest.raises(Exception, match="expected a concept at .*concept.safetensors; got no such file; train it"):
        ConfigurationHooks().before_pipeline_run(pipeline, catalog)


def test_a_concept_in_place_is_only_replaced_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "concept.safetensors"
    pipeline = Pipeline([node(lambda params: params, "params:import", "concept", name="import_concept")])

    def before_run(**values: Any) -> None:
        catalog = DataCatalog({"concept": ConceptDataset(filepath=str(file))})
        catalog["params:import"] = ImportParams(**values)
        ConfigurationHooks().before_pipeline_run(pipeline, catalog)

    before_run()
    file.touch()
    with pytest.raises(InputError, match=f"{file}, which is there already; .*import.replace=true"):
        before_run()
    before_run(replace=True)


CONCEPT = ConceptMetadata(
    base_model="tiny",
    base_model_fingerprint="0123",
    num_branches=2,
    num_steps=3,
    words={},
    num_vectors=(3, 6),
    lora={"unet": (ResolvedGroup(**LORA, name="unet.0.shared"),)},
)


def before_run(names: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Do what happens before a run of these pipelines, whose files are all there; `changes` are to sections."""
    sections = {
        "evaluation": EvaluationParams.model_validate(
            {"prompts": ["a {pt1}"], "prior_prompts": ["a cat"], **changes.get("evaluation", {})}
        ),
        "export": ExportParams.model_validate({"title": "fox", **changes.get("export", {})}),
        "regularization": RegularizationParams.model_validate(
            {"sampler": {"num_inference_steps": 2}, **changes.get("regularization", {})}
        ),
        "generate": GenerateParams.model_validate({"prompts": ["a {pt1}"], **changes.get("generate", {})}),
        "import": ImportParams(replace=True),
        **build_parameters(training(**changes.get("training", {}))),
    }
    catalog = DataCatalog.from_config({}, {})
    for section, params in sections.items():
        catalog[f"params:{section}"] = params
    catalog["concept"] = Concept({}, CONCEPT.model_copy(update=changes.get("concept", {})))
    monkeypatch.setattr(DataCatalog, "exists", lambda *_: True)
    pipeline = sum((register_pipelines()[name] for name in names.split(",")), Pipeline([]))
    ConfigurationHooks().before_pipeline_run(pipeline, catalog)


@pytest.mark.parametrize("names", ["__default__", "train,export"])
def test_a_run_that_exports_what_it_trains_asks_whether_it_can(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [LORA | {"timestep_min_rank": 1}]
    with pytest.raises(InputError, match="because this run exports them; got training.lora_unet.0 with"):
        before_run(names, monkeypatch, training={"lora_unet": groups})


@pytest.mark.parametrize("names", ["train", "export", "import,export"])
def test_a_run_that_exports_nothing_that_it_trains_does_not_ask(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before_run(names, monkeypatch, training={"lora_unet": [LORA | {"timestep_min_rank": 1}]})


HEUN = {"scheduler": "HeunDiscreteScheduler"}
WORDS = {"words": {"names": {"pt1": ["my-fox", "my-fox-neg"]}}, "guidance_scale": "3.0"}


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (
            "__default__",
            {"evaluation": {"sampler": {"scheduler_options": {"nonsense": 1}}}},
            "evaluation: .*'nonsense'",
        ),
        ("__default__", {"export": {"sampler": {"scheduler_options": {"algorithm_type": "x"}}}}, "export: .*diffusers"),
        ("train,generate", {"generate": {"sampler": {"scheduler_options": {"nonsense": 1}}}}, "generate: .*'nonsense'"),
        (
            "__default__",
            {"training": {"zero_terminal_snr": True}, "evaluation": {"sampler": HEUN}},
            "evaluation: .*ends without signal; got HeunDiscreteScheduler",
        ),
        (
            "train,generate",
            {"training": {"zero_terminal_snr": True}, "generate": {"sampler": HEUN}},
            "generate: .*ends without signal; got HeunDiscreteScheduler",
        ),
        (
            "__default__",
            {"training": {"zero_terminal_snr": True}, "export": {"sampler": HEUN}},
            "export: .*ends without signal; got HeunDiscreteScheduler",
        ),
        ("__default__", {"export": {"sampler": {"scheduler": "PNDMScheduler"}}}, "export: .*ComfyUI.*PNDMScheduler"),
        (
            "train,export",
            {"export": {"sampler": {"scheduler_options": {"algorithm_type": "sde-dpmsolver++"}}}},
            "export: .*ComfyUI.*algorithm_type",
        ),
        (
            "train,export",
            {
                "training": WORDS | {"lora_unet": []},
                "export": {"sampler": {"scheduler": "TCDScheduler"}, "formats": ["embeddings"]},
            },
            "export: .*ComfyUI.*TCDScheduler",
        ),
        ("evaluate", {"evaluation": {"sampler": {"scheduler_options": {"nonsense": 1}}}}, "evaluation: .*'nonsense'"),
        (
            "generate",
            {"concept": {"zero_terminal_snr": True}, "generate": {"sampler": HEUN}},
            "generate: .*ends without signal; got HeunDiscreteScheduler",
        ),
        (
            "export",
            {"concept": {"lora": {"unet": (ResolvedGroup(**LORA, name="unet.0.shared", timestep_min_rank=1),)}}},
            r"export: .*got lora_unet.0 with timestep_min_rank=1",
        ),
        ("export", {"export": {"sampler": {"scheduler": "PNDMScheduler"}}}, "export: .*ComfyUI.*PNDMScheduler"),
        (
            "train",
            {"regularization": {"sampler": {"scheduler_options": {"nonsense": 1}}}},
            "regularization: .*'nonsense'",
        ),
        (
            "__default__",
            {"evaluation": {"evaluators": ["clip:/no/such/folder"]}},
            "evaluation: expected a folder with a clip model",
        ),
    ],
)
def test_what_comes_after_the_training_is_checked_before_it(
    names: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=message):
        before_run(names, monkeypatch, **changes)


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        ("__default__", {"evaluation": {"sampler": HEUN}, "export": {"sampler": HEUN}}),
        ("evaluate", {"training": {"zero_terminal_snr": True}, "evaluation": {"sampler": HEUN}}),  # another training's
        ("train,export", {"export": {"sampler": {"scheduler": "TCDScheduler"}, "formats": ["peft"]}}),  # no workflow
        (
            "train,export",
            {"training": WORDS, "export": {"sampler": {"scheduler": "TCDScheduler"}, "formats": ["kohya"]}},
        ),
    ],
)
def test_a_sampler_that_suits_what_the_run_does_is_accepted(
    names: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before_run(names, monkeypatch, **changes)


def test_an_environment_without_a_folder_is_refused_with_those_there_are(tmp_path: Path) -> None:
    for name in ("base", "local"):
        (tmp_path / name).mkdir()
    check_environment(tmp_path, "local")
    with pytest.raises(InputError, match="expected an environment out of base, local; got 'loc'"):
        check_environment(tmp_path, "loc")


def test_a_run_is_named_after_subject_pipeline_method_and_what_differs() -> None:
    run_params = {"runtime_params": {"subject": "cat", "training": {"num_steps": 10, "loss": {"snr_gamma": 3}}}}
    assert run_name({"subject": "cat", "method": "lora"}, ["train"], run_params) == (
        "cat · train · lora · training.num_steps=10 · training.loss.snr_gamma=3"
    )


def test_a_run_of_the_default_pipeline_without_parameters_has_a_short_name() -> None:
    assert run_name({"subject": "cat", "method": "lora"}, ["__default__"], {"runtime_params": {}}) == (
        "cat · default · lora"
    )


def test_typed_parameters_are_recorded_as_plain_values() -> None:
    inputs: dict[str, Any] = {"params:device": DeviceParams(device="cpu"), "image": b"x"}
    RunRecordHooks().before_node_run(inputs)
    assert inputs == {"params:device": {"device": "cpu", "dtype": "float32"}, "image": b"x"}


def test_lists_of_groups_are_recorded_one_row_a_value() -> None:
    assert number_lists({"lora": [{"lr": 1}, {"lr": 2}], "sizes": [1, 2]}) == {
        "lora": {"0": {"lr": 1}, "1": {"lr": 2}},
        "sizes": [1, 2],
    }


def test_nested_values_get_dotted_names() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_a_run_knows_its_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "start")
    commit = git("rev-parse", "HEAD")
    assert git_tags(tmp_path) == {"git_commit": commit, "git_dirty": "false"}
    (tmp_path / "new").write_text("x")
    assert git_tags(tmp_path) == {"git_commit": commit, "git_dirty": "true"}


def test_a_project_outside_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_tags(tmp_path) == {}


def test_the_summary_repeats_the_base_model_that_was_given() -> None:
    settings = {"subject": "cat", "base_model": "/models/x"}

    def generating(**given: str) -> str:
        return look_at_it(settings, {"env": "sd15", "runtime_params": given}, Path("/project"))[-1]

    assert generating(base_model="/models/x").endswith(
        'kedro run --pipeline generate --env sd15 --params "subject=cat,base_model=/models/x,'
        'generate.prompts=a {pt1}, blue background"'
    )
    assert "base_model" not in generating()


def test_the_summary_lists_files_relative_to_the_project(tmp_path: Path) -> None:
    catalog = DataCatalog({"concept": ConceptDataset(filepath=str(tmp_path / "data" / "c.safetensors"))})
    pipeline = Pipeline([node(lambda x: (x, x), "x", ["concept", "in_memory"], name="train")])
    assert written_files(pipeline, catalog, tmp_path) == [("concept", "data/c.safetensors")]
