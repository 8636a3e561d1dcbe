"""Checks before a run, its record, and its closing summary."""

from __future__ import annotations

import contextlib
import functools
import io
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kedro.io import DataCatalog, DatasetError, MemoryDataset
from kedro.pipeline import Pipeline, node
from PIL import Image

from dreamartist_pipeline.cli import run
from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.datasets.image import ReferenceImageDataset
from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import (
    Commands,
    ConfigurationHooks,
    ConsoleHooks,
    MLflowHooks,
    build_parameters,
    check_image_has_subject,
    check_names,
    check_subject,
    flatten,
    git_tags,
    input_error_in,
    mlflow_lines,
    next_lines,
    number_lists,
    run_name,
    written_files,
)
from dreamartist_pipeline.hooks import run as run_hooks
from dreamartist_pipeline.hooks.run import literal, pipelines_of, plain
from dreamartist_pipeline.params import (
    DeviceParams,
    EvaluationParams,
    ExportParams,
    GenerateParams,
    ImportParams,
    IngestionParams,
    PromptsParams,
    RegularizationParams,
    ResolvedGroup,
)
from dreamartist_pipeline.pipeline_registry import register_pipelines
from refusals import says
from tracking_stores import tracking_uri

LORA = {"lr": 1e-3, "rank": 4, "layers": ["re:.*attn"]}
SCORED = {
    "choose": "best",
    "num_steps": 400,
    "scoring": {"every": 100, "prompts": ["a cat"], "prior_prompts": ["a dog"]},
}


def training(**changes: Any) -> dict[str, Any]:
    return {"training": {"num_steps": 2, "lora_unet": [LORA | {"branch": "p"}], "guidance_scale": "1.0", **changes}}


def test_an_unknown_section_on_the_command_line_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InputError, check=says(got="'trainign' from --params", remedy="'training'")):
        check_names(["trainign"], origin="--params")


def test_settings_and_sections_are_known() -> None:
    check_names(["subject", "image", "training", "device"], origin="--params")


def test_a_files_own_variables_are_not_parameters() -> None:
    assert build_parameters({"_subject": "fox", "prompts": {"num_prompts": 3}}) == {
        "prompts": PromptsParams(num_prompts=3)
    }


def test_variables_cannot_come_from_the_command_line() -> None:
    with pytest.raises(InputError, check=says(got="'_methods'")):
        check_names(["_methods"], origin="--params")


@pytest.mark.parametrize(
    ("parameters", "texts"),
    [
        (training(num_stepz=1), ["training.num_stepz: unknown key", "'num_steps'"]),
        (training(loss={"snr_gama": 1}), ["training.loss.snr_gama: unknown key", "'snr_gamma'"]),
        (training(lora_unet=[LORA | {"rnk": 1}]), ["training.lora_unet.0.rnk: unknown key", "'rank'"]),
        (training(words={"names": {"pt1": "a, b"}}), ["training.words.names.pt1", "['a', 'b']"]),
        (training(loss="huber"), ["training.loss:", "training.loss.KEY=VALUE"]),
        (training(lora_unet=[LORA | {"rank": 0}]), ["training.lora_unet.0.rank: ", "got 0"]),
        (training(words={"lr": -1}), ["training.words.lr: ", "got -1"]),
        (training(words={"names": {"pt1": ["a", "a"]}}), ["training.words", "'a'"]),
        ({"device": {"device": "gpu"}}, ["device.device: ", "'cuda'", "got 'gpu'"]),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_full_name(parameters: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        build_parameters(parameters)
    _, problem = raised.value.got.splitlines()
    assert [text for text in texts if text not in problem] == []


def test_all_wrong_parameters_are_reported_at_once() -> None:
    with pytest.raises(InputError) as raised:
        build_parameters(training(num_steps=-1) | {"device": {"dtype": "int8"}, "prompts": {"num_prompts": -1}})
    for name in ("training.num_steps", "device.dtype", "prompts.num_prompts"):
        assert name in str(raised.value)


@pytest.mark.parametrize("subject", ["my cat", "../x", "", "-x", "a/b", None])
def test_a_subject_that_cannot_name_a_folder_is_refused(subject: object) -> None:
    with pytest.raises(InputError, check=says(expected="a subject", got=f"'{subject}'")):
        check_subject(subject)


@pytest.mark.parametrize(
    ("subject", "suggested"),
    [
        ("Kätzchen", "kaetzchen"),
        ("Ka\u0308tzchen", "kaetzchen"),  # as macOS writes it
        ("Łódź", "lodz"),
        ("Ðuro", "duro"),
        ("København", "kobenhavn"),
        ("Straße 1", "strasse-1"),
        ("İstanbul", "istanbul"),
        ("Phở", "pho"),
        ("кот", "kot"),
        ("Ёжик", "yozhik"),
        ("γάτα", "gata"),
        ("猫 cat", "cat"),
        ("猫", "cat"),
        ("🦊", "fox-face"),
        ("my 🦊", "my-fox-face"),
        ("../x", "x"),
        (None, "cat"),
    ],
)
def test_a_refused_subject_is_suggested_in_ascii(subject: str | None, suggested: str) -> None:
    check_subject(suggested)
    with pytest.raises(InputError, check=says(remedy=f"'{suggested}'")):
        check_subject(subject)


@pytest.mark.parametrize("subject", ["fox", "my-cat_2.b", 42])
def test_an_ordinary_subject_is_accepted(subject: object) -> None:
    check_subject(subject)


def test_an_image_without_a_subject_is_refused() -> None:
    with pytest.raises(InputError, check=says(got="image=cat.jpg", remedy="subject=NAME")):
        check_image_has_subject({"image": "cat.jpg"})
    check_image_has_subject({"image": "cat.jpg", "subject": "cat"})


def test_a_missing_input_is_found_before_the_run(tmp_path: Path) -> None:
    catalog = DataCatalog({"concept": ConceptDataset(filepath=str(tmp_path / "concept.safetensors"))})
    pipeline = Pipeline([node(lambda concept: concept, "concept", "images", name="generate")])
    with pytest.raises(DatasetError) as raised:
        ConfigurationHooks().before_pipeline_run(pipeline, catalog)
    error = input_error_in(raised.value)
    assert isinstance(error, FileError)
    assert says(expected="concept.safetensors", got="no such file")(error)


@pytest.mark.parametrize(
    ("names", "missing", "remedy"),
    [
        ("evaluate", "prepared_image", "--pipeline ingestion --env sd15 --params subject=NAME,image=PICTURE"),
        ("training", "regularization_set", "--pipeline regularization --env sd15 --params subject=NAME"),
        ("regularization", "regularization_prompts", "--pipeline prompts --env sd15 --params subject=NAME"),
    ],
)
def test_a_missing_file_of_another_pipeline_is_answered_with_that_pipeline(
    names: str, missing: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dreamartist_pipeline.hooks.configuration.pipelines", register_pipelines())
    monkeypatch.setattr(DataCatalog, "exists", lambda _, name: name not in (missing, "reference_image"))
    catalog = DataCatalog({missing: ReferenceImageDataset(filepath=str(tmp_path / "missing.png"))})
    catalog["params:device"] = DeviceParams(device="cpu")
    hooks = ConfigurationHooks()
    hooks._env = "sd15"
    with pytest.raises(InputError, check=says(expected="missing.png", got="no such file", remedy=remedy)):
        hooks.before_pipeline_run(register_pipelines()[names], catalog)


def test_a_missing_gpu_is_said_before_missing_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    catalog = DataCatalog({})
    catalog["params:device"] = DeviceParams(device="cuda")
    with pytest.raises(InputError, check=says(where="device", remedy="device=cpu")):
        ConfigurationHooks().before_pipeline_run(register_pipelines()["train"], catalog)


@pytest.mark.parametrize(("command", "opened"), [(run, []), (click.Command("ui"), ["context"]), (None, ["context"])])
def test_only_kedro_run_opens_the_tracking_store_after_the_checks(
    command: click.Command | None, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    plugin = SimpleNamespace(
        after_catalog_created=lambda catalog, *_: calls.append(catalog),
        before_pipeline_run=lambda *given: calls.append(given),
    )
    monkeypatch.setattr(MLflowHooks, "_register", lambda _, context: calls.append(context) or plugin)
    monkeypatch.setattr(MLflowHooks, "_prepare_run", lambda *_: calls.append("prepared"))
    hooks: Any = MLflowHooks()
    with click.Context(command) if command else contextlib.nullcontext():
        hooks.after_context_created("context")
    assert calls == opened
    hooks.before_pipeline_run({}, "pipeline", "catalog")
    assert calls == ["context", "prepared", *([] if opened else ["catalog", ({}, "pipeline", "catalog")])]


def importing(file: Path, **values: Any) -> ConfigurationHooks:
    """Return the hooks after the checks before an import."""
    catalog = DataCatalog({"concept": ConceptDataset(filepath=str(file))})
    catalog["params:import"] = ImportParams(**values)
    hooks = ConfigurationHooks()
    hooks.before_pipeline_run(
        Pipeline([node(lambda params: params, "params:import", "concept", name="import_concept")]), catalog
    )
    return hooks


def concept_of(*imported: tuple[str, str], value: float = 1.0) -> Concept:
    changes = {
        "lora": {"unet": (), "text_encoder": ()},
        "words": {"pt1": ("my-fox", "my-fox-neg")},
        "imported_from": imported or None,
    }
    words = {"words.positive.pt1": torch.full((3, 4), value), "words.negative.pt1": torch.zeros(6, 4)}
    return Concept(words, CONCEPT.model_copy(update=changes))


def test_an_existing_concept_is_replaced_only_on_request(tmp_path: Path) -> None:
    file = tmp_path / "concept.safetensors"
    importing(file)
    file.touch()
    with pytest.raises(InputError, check=says(got=f"{file}", remedy="import.replace=true")):
        importing(file)
    importing(file, replace=True)
    ConceptDataset(filepath=str(file)).save(concept_of())
    with pytest.raises(InputError, check=says(got=f"{file}", remedy="import.replace=true")):
        importing(file)


def test_an_import_that_was_killed_at_its_end_can_be_repeated(tmp_path: Path) -> None:
    file = tmp_path / "concept.safetensors"
    concept = concept_of(("a.safetensors", "0" * 64))
    ConceptDataset(filepath=str(file)).save(concept)
    importing(file).before_dataset_saved("concept", concept)
    for other in (concept_of(("a.safetensors", "1" * 64)), concept_of(("a.safetensors", "0" * 64), value=2.0)):
        with pytest.raises(InputError, check=says(got="a.safetensors", remedy="import.replace=true")):
            importing(file).before_dataset_saved("concept", other)
        importing(file, replace=True).before_dataset_saved("concept", other)


BeforeRun = Callable[..., None]
CONCEPT = ConceptMetadata(
    base_model="tiny",
    base_model_fingerprint="0123",
    num_branches=2,
    num_steps=3,
    words={},
    num_vectors=(3, 6),
    lora={"unet": (ResolvedGroup(**LORA, name="unet.0.shared"),)},
)


@pytest.fixture
def before_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BeforeRun:
    """Run the checks of these pipelines, as if all files existed."""
    return functools.partial(check_run, tmp_path, monkeypatch)


def check_run(folder: Path, monkeypatch: pytest.MonkeyPatch, names: str, **changes: Any) -> None:
    """`changes` are by section of the parameters, and of the concept's metadata."""
    sections = {
        "evaluation": EvaluationParams.model_validate(
            {"prompts": ["a {pt1}"], "prior_prompts": ["a cat"], **changes.get("evaluation", {})}
        ),
        "export": ExportParams.model_validate({"title": "fox", **changes.get("export", {})}),
        "regularization": RegularizationParams.model_validate(
            {"sampler": {"num_inference_steps": 2}, **changes.get("regularization", {})}
        ),
        "generate": GenerateParams.model_validate({"prompts": ["a {pt1}"], **changes.get("generate", {})}),
        "device": DeviceParams.model_validate({"device": "cpu", **changes.get("device", {})}),
        "prompts": PromptsParams.model_validate({"num_prompts": 2, **changes.get("prompts", {})}),
        "ingestion": IngestionParams.model_validate({"bucket": {"side_px": 64}}),
        "import": ImportParams(replace=True),
        **build_parameters(training(**changes.get("training", {}))),
    }
    catalog = DataCatalog.from_config({}, {})
    for section, params in sections.items():
        catalog[f"params:{section}"] = params
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    catalog["reference_image"] = changes.get("picture", picture.getvalue())
    catalog["attention_mask_image"] = MemoryDataset(changes.get("mask"))
    catalog["reference_caption"] = changes.get("caption", "white background")
    catalog["evaluation_views"] = MemoryDataset({})
    catalog["concept_steps"] = MemoryDataset({80: None})
    catalog["base_model"] = ModelLocation(str(folder / "model"))
    prompts = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a red cat", "a blue dog"]}), prompts)
    catalog["prompt_database"] = MemoryDataset(pq.ParquetFile(prompts), copy_mode="assign")
    catalog["concept"] = ConceptDataset(filepath=str(folder / "concept.safetensors"))
    catalog["concept"].save(Concept({}, CONCEPT.model_copy(update=changes.get("concept", {}))))
    monkeypatch.setattr(ConceptDataset, "load", lambda _: pytest.fail("read the whole concept"))
    monkeypatch.setattr(DataCatalog, "exists", lambda *_: True)
    pipeline = sum((register_pipelines()[name] for name in names.split(",")), Pipeline([]))
    ConfigurationHooks().before_pipeline_run(pipeline, catalog)


@pytest.mark.parametrize("names", ["__default__", "train,export"])
def test_what_a_run_trains_is_checked_against_its_export(names: str, before_run: BeforeRun) -> None:
    groups = [LORA | {"timestep_min_rank": 1}]
    with pytest.raises(InputError, check=says(where="export", got="training.lora_unet.0 with timestep_min_rank=1")):
        before_run(names, training={"lora_unet": groups})


@pytest.mark.parametrize("names", ["train", "export", "import,export"])
def test_a_training_that_the_run_does_not_export_is_not_checked(names: str, before_run: BeforeRun) -> None:
    before_run(names, training={"lora_unet": [LORA | {"timestep_min_rank": 1}]})


@pytest.mark.parametrize(
    ("names", "section", "training", "known"),
    [
        ("generate", "generate", {}, "80"),
        ("evaluate", "evaluation", {}, "80"),
        ("export", "export", {}, "80"),
        ("train,evaluate", "evaluation", {}, "none"),
        ("__default__", "export", SCORED, "100, 200, 300, 400"),
    ],
)
def test_a_step_that_is_not_kept_or_will_not_be_scored_is_refused(
    names: str, section: str, training: dict[str, Any], known: str, before_run: BeforeRun
) -> None:
    with pytest.raises(InputError, check=says(where=section, expected=f"({known})", got="81")):
        before_run(names, **{section: {"step": 81}}, training=training)


HEUN = {"scheduler": "HeunDiscreteScheduler"}
WORDS = {"words": {"names": {"pt1": ["my-fox", "my-fox-neg"]}}, "guidance_scale": "3.0"}


@pytest.mark.parametrize(
    ("names", "changes", "parts"),
    [
        (
            "__default__",
            {"evaluation": {"sampler": {"scheduler_options": {"nonsense": 1}}}},
            {"where": "evaluation", "got": "'nonsense'"},
        ),
        (
            "__default__",
            {"export": {"sampler": {"scheduler_options": {"algorithm_type": "x"}}}},
            {"where": "export", "got": "'algorithm_type': 'x'"},
        ),
        (
            "train,generate",
            {"generate": {"sampler": {"scheduler_options": {"nonsense": 1}}}},
            {"where": "generate", "got": "'nonsense'"},
        ),
        (
            "__default__",
            {"training": {"zero_terminal_snr": True}, "evaluation": {"sampler": HEUN}},
            {"where": "evaluation", "got": "HeunDiscreteScheduler"},
        ),
        (
            "train,generate",
            {"training": {"zero_terminal_snr": True}, "generate": {"sampler": HEUN}},
            {"where": "generate", "got": "HeunDiscreteScheduler"},
        ),
        (
            "__default__",
            {"training": {"zero_terminal_snr": True}, "export": {"sampler": HEUN}},
            {"where": "export", "got": "HeunDiscreteScheduler"},
        ),
        (
            "__default__",
            {"export": {"sampler": {"scheduler": "PNDMScheduler"}}},
            {"where": "export", "expected": "ComfyUI", "got": "PNDMScheduler"},
        ),
        (
            "train,export",
            {"export": {"sampler": {"scheduler_options": {"algorithm_type": "sde-dpmsolver++"}}}},
            {"where": "export", "expected": "ComfyUI", "got": "algorithm_type"},
        ),
        (
            "train,export",
            {
                "training": WORDS | {"lora_unet": []},
                "export": {"sampler": {"scheduler": "TCDScheduler"}, "formats": ["embeddings"]},
            },
            {"where": "export", "expected": "ComfyUI", "got": "TCDScheduler"},
        ),
        (
            "evaluate",
            {"evaluation": {"sampler": {"scheduler_options": {"nonsense": 1}}}},
            {"where": "evaluation", "got": "'nonsense'"},
        ),
        (
            "train",
            {"prompts": {"num_prompts": 3}},
            {"where": "prompts", "expected": "prompts.num_prompts=3", "got": "2 (in 2 rows"},
        ),
        ("prompts", {"prompts": {"column": "text"}}, {"where": "prompts", "expected": "'prompt'", "got": "'text'"}),
        ("train", {"caption": "a {sofa"}, {"where": "training", "got": "a {sofa"}),
        ("ingestion", {"picture": b"# A text"}, {"where": "ingestion", "got": "b'# A text'"}),
        ("ingestion", {"mask": b""}, {"where": "ingestion", "expected": "mask", "got": "empty"}),
        (
            "train,generate",
            {"training": WORDS, "generate": {"prompts": ["a {pt1}", "a {blue} {pt1}"]}},
            {"where": "generate", "expected": "{pt1}", "got": "{blue} in", "remedy": "{blue:1.1}"},
        ),
        (
            "evaluate",
            {"concept": {"words": {"pt1": ("a", "b")}}, "evaluation": {"prompts": ["a {pt1} in {nosuch}"]}},
            {"where": "evaluation", "got": "{nosuch}"},
        ),
        (
            "generate",
            {"concept": {"zero_terminal_snr": True}, "generate": {"sampler": HEUN}},
            {"where": "generate", "got": "HeunDiscreteScheduler"},
        ),
        (
            "export",
            {"concept": {"lora": {"unet": (ResolvedGroup(**LORA, name="unet.0.shared", timestep_min_rank=1),)}}},
            {"where": "export", "got": "lora_unet.0 with timestep_min_rank=1"},
        ),
        (
            "export",
            {"export": {"sampler": {"scheduler": "PNDMScheduler"}}},
            {"where": "export", "expected": "ComfyUI", "got": "PNDMScheduler"},
        ),
        (
            "train",
            {"regularization": {"sampler": {"scheduler_options": {"nonsense": 1}}}},
            {"where": "regularization", "got": "'nonsense'"},
        ),
        *(
            (names, {"device": {"device": "cuda"}}, {"where": "device", "expected": "CUDA", "remedy": "device=cpu"})
            for names in ("train", "evaluate", "generate")
        ),
        (
            "train",
            {"prompts": {"num_prompts": 0}, "training": {"regularization_batch_size": 1}},
            {"where": "prompts", "expected": "training.regularization_batch_size=0", "got": "prompts.num_prompts=0"},
        ),
        (
            "__default__",
            {"evaluation": {"evaluators": ["clip:/no/such/folder"]}},
            {"where": "evaluation", "expected": "clip", "got": "/no/such/folder"},
        ),
    ],
)
def test_parameters_of_later_nodes_are_checked_before_the_run(
    names: str,
    changes: dict[str, Any],
    parts: dict[str, str],
    before_run: BeforeRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, check=says(**parts)):
        before_run(names, **changes)


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        ("__default__", {"evaluation": {"sampler": HEUN}, "export": {"sampler": HEUN}}),
        ("evaluate", {"training": {"zero_terminal_snr": True}, "evaluation": {"sampler": HEUN}}),  # another training's
        ("train,export", {"export": {"sampler": {"scheduler": "TCDScheduler"}, "formats": ["peft"]}}),  # no workflow
        ("train", {"prompts": {"num_prompts": 0}, "training": {"regularization_batch_size": 0}}),
        (
            "train,export",
            {"training": WORDS, "export": {"sampler": {"scheduler": "TCDScheduler"}, "formats": ["kohya"]}},
        ),
    ],
)
def test_a_sampler_that_suits_the_run_is_accepted(names: str, changes: dict[str, Any], before_run: BeforeRun) -> None:
    before_run(names, **changes)


def test_a_run_is_named_after_subject_pipeline_method_and_what_differs() -> None:
    given = {"subject": "cat", "training": {"num_steps": 10, "loss": {"snr_gamma": 3}}}
    assert run_name({"subject": "cat", "method": "lora"}, ["train"], given) == (
        "cat · train · num_steps=10 · loss.snr_gamma=3 · lora"
    )


def test_long_values_and_groups_are_short_in_the_name_of_a_run() -> None:
    given = {"training": {"lora_unet": [{"lr": 1}, {"lr": 2}]}, "generate": {"prompts": "a ${x} " + "cat " * 40}}
    name = run_name({"subject": "cat", "method": None}, ["train"], literal_texts(given))
    assert "lora_unet=[2 groups]" in name
    assert "a ${x} cat" in name and len(name) < 120


def literal_texts(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as `--params` gives them."""
    return {name: literal_texts(value) if isinstance(value, dict) else literal(value) for name, value in values.items()}


def test_a_run_of_the_default_pipeline_without_parameters_has_a_short_name() -> None:
    assert run_name({"subject": "cat", "method": "lora"}, ["__default__"], {}) == "cat · default · lora"


@pytest.mark.parametrize(
    ("pipeline", "section", "name"),
    [
        ("compare", {"workers": 2, "only": ["lora"]}, "compare · compare.only=['lora']"),
        ("tune", {"params": {"training": {"seed": 1}}}, "tune"),
        ("personalize", {"subjects": f"/mnt/{'studio/' * 20}characters.csv"}, "personalize · characters.csv"),
        ("sweep", {"name": "rates", "space": {"method": ["lora"]}}, "sweep · rates"),
    ],
)
def test_a_run_that_starts_others_is_named_after_what_it_is_about(
    pipeline: str, section: dict[str, Any], name: str
) -> None:
    given = {pipeline: section, "compare": section if pipeline == "compare" else {"threads": 1}}
    given["training"] = {"num_steps": 5}
    assert run_name({"subject": "fox", "method": None}, [pipeline], given) == f"{name} · num_steps=5"


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


# ------------------------------------------------------------------------------------------------- closing summary


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project folder, which is the working directory."""
    (tmp_path / "pyproject.toml").write_text(
        '[tool.kedro]\npackage_name = "x"\nproject_name = "x"\nkedro_init_version = "1.7.0"\n'
    )
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(command: str, program: str = "kedro run") -> dict[str, Any]:
    """Return the options of a printed command, as the command line reads them."""
    words = shlex.split(command)
    used = program.split()
    assert [Path(words[0]).name, *words[1 : len(used)]] == used
    given = run.make_context("run", words[len(used) :]).params
    return {name: value for name, value in given.items() if value}


GIVEN = {"base_model": "models/x y", "device": {"device": "cpu"}, "training": {"num_steps": 3}}


def test_printed_commands_have_subject_base_model_device_and_environment_of_the_run(project: Path) -> None:
    commands = Commands(project, str(project / "conf"), "sd15", {"subject": "cat"})
    prompt = "a {pt1}, blue background"
    assert parsed(commands.run("generate", GIVEN, **{"generate.prompts": prompt})) == {
        "pipeline": "generate",
        "env": "sd15",
        "params": {
            "subject": "cat",
            "base_model": "models/x y",
            "device": {"device": "cpu"},
            "generate": {"prompts": prompt},
        },
    }
    assert parsed(commands.run("evaluate", {})) == {
        "pipeline": "evaluate",
        "env": "sd15",
        "params": {"subject": "cat"},
    }


def test_printed_commands_hold_in_the_working_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "other").mkdir()
    commands = Commands(project, str(project / "other"), "local", {"subject": "cat"})
    monkeypatch.chdir(project / "notebooks")
    assert parsed(commands.run("generate", GIVEN)) == {
        "pipeline": "generate",
        "conf_source": str(project / "other"),
        "params": {"subject": "cat", "base_model": str(project / "models/x y"), "device": {"device": "cpu"}},
    }


def test_kedro_viz_shows_the_subject_and_environment_of_the_run(project: Path) -> None:
    from kedro_viz.launchers.cli.run import run as viz

    def options(command: str) -> dict[str, Any]:
        words = shlex.split(command)
        assert words[1:3] == ["viz", "run"]
        return viz.make_context("run", words[3:]).params

    shown = Commands(project, str(project / "conf"), "sd15", {"subject": "cat"}).viz({})
    assert shown is not None
    given = options(shown)
    assert (given["env"], given["params"]) == ("sd15", {"subject": "cat"})
    assert Commands(project, str(project / "conf.tar.gz"), "sd15", {"subject": "cat"}).viz({}) is None
    settings = {"subject": "007", "image": "my pots/a.png", "caption": "no, ${x} 'a' \"b\", c=d", "method": "lora"}
    shown = Commands(project, str(project / "conf"), None, settings).viz({"image": "", "caption": "", "device": {}})
    assert shown is not None
    assert plain(options(shown)["params"]) == {name: settings[name] for name in ("subject", "image", "caption")}


def test_a_packaged_run_prints_its_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf.tar.gz").touch()
    commands = Commands(tmp_path, str(tmp_path / "conf.tar.gz"), None, {"subject": "cat"})
    assert parsed(commands.run("generate", {}), "dreamartist-pipeline") == {
        "pipeline": "generate",
        "conf_source": str(tmp_path / "conf.tar.gz"),
        "params": {"subject": "cat"},
    }


def test_an_imported_concept_is_compared_with_a_picture_that_is_prepared_first(project: Path) -> None:
    lines = lines_after("import", project, {"pt1": ("my-cat", "my-cat-neg")})
    assert parsed(lines["compare with base model"]) == {
        "pipelines": ["ingestion", "evaluate"],
        "params": {"subject": "cat", "image": "PICTURE"},
    }


def lines_after(names: str, project: Path, words: dict[str, tuple[str, str]] | None) -> dict[str, str]:
    """Return what is printed after a run of pipelines, by purpose; `words` None for a subject without a concept."""
    catalog = DataCatalog({"concept": ConceptDataset(filepath=str(project / "c.safetensors"))})
    if words is not None:
        catalog["concept"].save(Concept({}, CONCEPT.model_copy(update={"words": words})))
    pipeline = sum((register_pipelines()[name] for name in names.split(",")), Pipeline([]))
    return dict(next_lines(Commands(project, str(project / "conf"), None, {"subject": "cat"}), pipeline, catalog, {}))


@pytest.mark.parametrize(
    ("names", "words", "expected"),
    [
        ("train", {"pt1": ("my-cat", "my-cat-neg")}, {"compare with base model", "new images"}),
        ("train,evaluate", {"pt1": ("my-cat", "my-cat-neg")}, {"new images"}),
        ("train", None, set()),  # such as --nodes check_training
        ("ingestion", {"pt1": ("my-cat", "my-cat-neg")}, set()),
    ],
)
def test_only_an_existing_concept_is_suggested(
    names: str, words: dict[str, tuple[str, str]] | None, expected: set[str], project: Path
) -> None:
    always = {"curves and previews", "  then open", "the pipelines"}
    assert lines_after(names, project, words).keys() - always == expected


def test_the_suggested_prompt_has_a_slot_of_the_concept(project: Path) -> None:
    command = lines_after("generate", project, {"style": ("ink", "ink-neg")})["new images"]
    assert parsed(command)["params"]["generate"]["prompts"] == "a {style}, blue background"


def test_the_summary_lists_files_as_the_working_directory_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = DataCatalog({"concept": ConceptDataset(filepath=str(tmp_path / "data" / "c.safetensors"))})
    pipeline = Pipeline([node(lambda x: (x, x), "x", ["concept", "in_memory"], name="train")])
    for folder, expected in ((tmp_path, "data/c.safetensors"), (tmp_path / "data", "c.safetensors")):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        assert written_files(pipeline, catalog) == {"concept": expected}
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.chdir("/")
    assert written_files(pipeline, catalog)["concept"].endswith("data/c.safetensors")


def test_a_tracking_server_is_linked_where_a_store_is_first_served(project: Path) -> None:
    with tracking_uri("http://runs.example:5000/"):
        assert mlflow_lines() == [("curves and previews", "http://runs.example:5000/")]
    with tracking_uri(f"sqlite:///{project / 'data' / 'mlflow.db'}"):
        (_, command), (_, address) = mlflow_lines()
    assert command.endswith("mlflow ui --backend-store-uri sqlite:///data/mlflow.db")
    assert address == "http://127.0.0.1:5000/"


def test_a_node_of_more_than_two_seconds_is_timed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick, slow = (node(lambda: 1, None, name, name=name) for name in ("quick", "slow"))
    clock = iter([0.0, 10.0, 11.0, 20.0, 23.5])
    monkeypatch.setattr("dreamartist_pipeline.hooks.console.time.monotonic", lambda: next(clock))
    hooks = ConsoleHooks()
    with caplog.at_level("INFO", "dreamartist_pipeline.hooks.console"):
        hooks.before_pipeline_run(Pipeline([quick, slow]))
        for running in (quick, slow):
            hooks.before_node_run(running)
            hooks.after_node_run(running)
    assert caplog.messages == ["[1/2] quick", "[2/2] slow", "      slow took 3.5 s"]


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({None: {"seed": 0}}, {"expected": "names", "got": "None"}),
        ({"training": {1: 2}}, {"got": "the key 1 in training"}),
        ({"training": {"lora_unet": [{True: 1}]}}, {"got": "training.lora_unet.0"}),
        ({"training": {"class_word": "\ud800"}}, {"expected": "training.class_word", "remedy": "UTF-8"}),
        ({"caption": "caf\udce9"}, {"expected": "Unicode as caption"}),
        ({"training": {"\ud800": 1}}, {"expected": "Unicode"}),
    ],
)
def test_parameters_that_are_no_text_where_they_must_be_are_refused(
    parameters: dict[Any, Any], parts: dict[str, str]
) -> None:
    with pytest.raises(InputError, check=says(**parts)) as caught:
        build_parameters(parameters)
    str(caught.value).encode()


def test_a_message_about_a_long_value_is_short() -> None:
    with pytest.raises(InputError) as caught:
        build_parameters({"generate": {"prompts": ["x" * 100_000]}})
    assert len(str(caught.value)) < 2000


def test_an_unknown_key_above_others_is_named_without_suggestions_from_elsewhere() -> None:
    training = {"num_steps": 1, "capti": [{"kind": "tag_shuffle", "nosuch": {"a": 1}}]}
    with pytest.raises(InputError, check=says(got="training.capti")):
        build_parameters({"training": training})


@pytest.mark.parametrize("names", [["register", "train", "evaluate"], ["evaluate", "register", "train"]])
def test_the_pipelines_of_a_run_are_named_in_the_order_of_their_work(
    monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setattr(run_hooks, "pipelines", register_pipelines())
    assert pipelines_of({"pipeline_names": names}) == ["train", "evaluate", "register"]
    assert pipelines_of({"pipeline_names": None}) == ["__default__"]
