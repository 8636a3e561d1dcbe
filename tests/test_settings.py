"""Configuration: presets, overlays, and where a run's settings come from."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from kedro.config import OmegaConfigLoader
from omegaconf.errors import OmegaConfBaseException

from dreamartist_pipeline import redaction, settings
from dreamartist_pipeline.cli import parse_params, run
from dreamartist_pipeline.datasets.user_files import UserFilesDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import build_parameters, input_error_in, load_parameters, register_project_root
from dreamartist_pipeline.params import SECTIONS, ParameterSearchParams, TrainingParams
from dreamartist_pipeline.pipelines.compare.sweeping import SweepRuns
from refusals import says

PROJECT = Path(__file__).resolve().parents[1]
METHODS = (
    "dreamartist-plus-plus",
    "tutorial",
    "toolkit",
    "textual-inversion",
    "lora",
    "dreambooth-lora",
    "pivotal-tuning",
    "dreamartist",
    "t-lora",
    "dreamartist-plus-plus-t-lora",
)


def config_loader(env: str = "local", **runtime_params: Any) -> OmegaConfigLoader:
    register_project_root(PROJECT)
    return settings.ProjectConfigLoader(
        conf_source=str(PROJECT / "conf"), env=env, runtime_params=runtime_params, **settings.CONFIG_LOADER_ARGS
    )


def load(key: str, env: str = "local", **runtime_params: Any) -> dict[str, Any]:
    return config_loader(env, **runtime_params)[key]


def training(env: str = "base", **runtime_params: Any) -> TrainingParams:
    return build_parameters(load("parameters", env, **runtime_params))["training"]


@pytest.mark.parametrize("env", ["base", "sd15", "sd21", "sdxl", "test"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_valid_in_every_environment(method: str, env: str) -> None:
    parameters = build_parameters(load("parameters", env, method=method))
    assert {name for name, value in parameters.items() if isinstance(value, SECTIONS.get(name, str))} >= set(SECTIONS)


def test_another_run_reads_what_the_files_of_an_environment_say_whatever_their_names(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "conf" / "base", tmp_path / "base")
    texts = ("_steps: 7\ncompare: {workers: 2}\n", 'training: {num_steps: "${_steps}"}\n')
    for names in (("parameters_mine.yml", "parameters_z.yml"), ("parameters_a.yml", "parameters_mine.yml")):
        shutil.rmtree(tmp_path / "mine", ignore_errors=True)
        (tmp_path / "mine").mkdir()
        for name, text in zip(names, texts, strict=True):
            (tmp_path / "mine" / name).write_text(text)
        loader = settings.ProjectConfigLoader(str(tmp_path), env="mine", **settings.CONFIG_LOADER_ARGS)
        assert loader["parameters"]["training"]["num_steps"] == 7
        assert loader.of_run({}, ["training"])["parameters"]["training"]["num_steps"] == 7


def test_the_documented_sweep_passes_the_check_before_its_first_run(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"```yaml\n(name: .*?)```", (PROJECT / "docs/sweeps.md").read_text(encoding="utf-8"), re.DOTALL
    )
    sweep = ParameterSearchParams.model_validate(yaml.safe_load(text) | {"images": "pictures", "folder": str(tmp_path)})
    examples = [request.params for request in SweepRuns(sweep).examples()]
    methods = [build_parameters(load("parameters", "base", **given))["training"] for given in examples]
    assert len(methods) == 4 and len({str(method.lora_unet) for method in methods}) == 2


@pytest.mark.parametrize(
    ("method", "num_branches", "has_words", "has_lora", "regularized"),
    [
        ("dreambooth-lora", 1, False, True, True),
        ("pivotal-tuning", 1, True, True, True),
        ("dreamartist", 2, True, False, False),
    ],
)
def test_a_method_trains_what_its_name_says(
    method: str, num_branches: int, has_words: bool, has_lora: bool, regularized: bool
) -> None:
    preset = training(method=method)
    assert preset.num_branches == num_branches
    assert bool(preset.words.names) == has_words
    assert bool(preset.lora_unet) == bool(preset.lora_text_encoder) == has_lora
    assert bool(preset.regularization_batch_size) == regularized


@pytest.mark.parametrize(("method", "num_branches"), [("t-lora", 1), ("dreamartist-plus-plus-t-lora", 2)])
def test_t_lora_halves_orthogonal_ranks_of_the_unet(method: str, num_branches: int) -> None:
    preset = training(method=method)
    assert preset.num_branches == len(preset.lora_unet) == num_branches
    assert {(group.rank, group.timestep_min_rank, group.orthogonal_init) for group in preset.lora_unet} == {
        (8, 4, "random")
    }


def test_dreambooth_says_a_rare_word_before_the_class_word() -> None:
    assert training(method="dreambooth-lora", class_word="cat").class_word == "sks cat"


def test_a_single_value_of_a_method_can_be_changed_for_one_run() -> None:
    changed = training(training={"num_steps": 10, "loss": {"snr_gamma": 3.0}})
    assert (changed.num_steps, changed.loss.snr_gamma, changed.loss.weighting) == (10, 3.0, "min_snr")
    assert len(changed.lora_unet) == 2


def test_a_single_value_can_be_changed_together_with_the_method() -> None:
    changed = training(method="lora", training={"num_steps": 10})
    assert (changed.num_steps, changed.num_branches, changed.words.names) == (10, 1, {})


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Return the configuration as `kedro package` archives it."""
    file = tmp_path / "conf.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(
            PROJECT / "conf", "conf", filter=lambda member: None if member.name.endswith("local/x.yml") else member
        )
    return file


def test_an_environment_is_found_in_an_archive(archive: Path) -> None:
    register_project_root(PROJECT)
    loader = settings.ProjectConfigLoader(str(archive), env="test", **settings.CONFIG_LOADER_ARGS)
    assert build_parameters(loader["parameters"])["training"].num_steps == 2


@pytest.mark.parametrize("archived", [False, True])
def test_an_environment_without_a_folder_is_refused_with_those_there_are(archived: bool, archive: Path) -> None:
    source = str(archive) if archived else str(PROJECT / "conf")
    with pytest.raises(InputError, check=says(expected="base, local, sd15, sd21, sdxl, test", got="'sd51'")):
        settings.ProjectConfigLoader(source, env="sd51", **settings.CONFIG_LOADER_ARGS)


def test_a_configuration_that_is_not_there_is_refused_with_the_option_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, check=says(expected=str(tmp_path / "conf"), remedy="--conf-source")):
        settings.ProjectConfigLoader(str(tmp_path / "conf"), env="base", **settings.CONFIG_LOADER_ARGS)


def test_a_reference_to_an_unknown_parameter_is_refused() -> None:
    loader = config_loader(training={"num_steps": "${nothing}"})
    with pytest.raises(InputError, check=says(got="nothing", remedy="{pt1}")):
        load_parameters(SimpleNamespace(config_loader=loader))  # type: ignore[arg-type]


def test_a_prompt_of_the_command_line_is_never_a_reference() -> None:
    context = click.Context(run)
    option = next(param for param in run.params if param.name == "params")
    given = parse_params(context, option, 'generate.prompts=["a ${foo} cat", "b"],caption=${globals:subject}')
    loader = config_loader(**given)
    assert loader["parameters"]["generate"]["prompts"] == ["a ${foo} cat", "b"]
    assert loader["catalog"]["reference_caption"]["caption"] == "${globals:subject}"


def test_one_entry_of_a_list_cannot_be_changed_alone() -> None:
    loader = config_loader(training={"lora_unet": {"0": {"rank": 2}}})
    with pytest.raises(InputError, check=says(got="{'0': {'rank': 2}}", remedy="training.lora_unet=[")):
        load_parameters(SimpleNamespace(config_loader=loader))  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", [{"training": {"num_steps": 10}}, {"pretrain": {"seed": 1}}])
def test_an_unknown_method_or_recipe_is_refused_where_its_values_are_changed_too(changed: dict[str, Any]) -> None:
    for setting in ("method", "recipe"):
        with pytest.raises(OmegaConfBaseException) as raised:
            load("parameters", **{setting: "nope"}, **changed)
        error = input_error_in(raised.value)
        assert error is not None
        assert (error.expected.split()[1], error.got) == (setting, "'nope'")


def test_an_unknown_method_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(OmegaConfBaseException) as raised:
        load("parameters", method="lorra")
    error = input_error_in(raised.value)
    assert error is not None
    assert all(method in error.expected for method in METHODS)
    assert says(got="'lorra'", remedy="'lora'")(error)


@pytest.mark.parametrize("method", ["dreamartist++", "DreamArtist++", "dreamartist+", "dreamartist plus plus"])
def test_dreamartist_with_plus_signs_is_found(method: str) -> None:
    with pytest.raises(OmegaConfBaseException) as raised:
        load("parameters", method=method)
    error = input_error_in(raised.value)
    assert error is not None
    assert says(got=f"'{method}'", remedy="'dreamartist-plus-plus'")(error)


def test_the_tutorial_preset_is_the_reference_tutorials() -> None:
    preset = training(method="tutorial")
    lora = {network: [(g.branch, g.rank, g.lr) for g in groups] for network, groups in preset.lora.items()}
    assert lora["unet"] == [("positive", 3, 1e-4), ("negative", 3, 2e-5)]
    assert lora["text_encoder"] == [("positive", 1, 1e-5), ("negative", 1, 1e-5)]
    assert preset.lora_unet[0].layers == (r"re:.*\.attn.?$",)


def test_the_toolkit_preset_is_the_reference_toolkits() -> None:
    preset = training(method="toolkit")
    assert [(g.branch, g.rank, g.lr, g.dropout) for g in preset.lora_unet] == [
        ("positive", 0.01875, 1e-4, 0.1),
        ("negative", 0.01875, 4e-5, 0.1),
    ]
    assert {(g.rank, g.lr) for g in preset.lora_text_encoder} == {(2, 2e-5)}
    assert (preset.words.lr, str(preset.guidance_scale), preset.loss.snr_gamma) == (2.5e-3, "3.0", 2.0)
    assert (preset.num_steps, preset.schedule.kind, preset.schedule.warmup_steps) == (1000, "one_cycle", 200)
    assert (preset.batch_size, preset.regularization_batch_size, preset.scale_lr) == (4, 1, True)


def test_the_subject_names_trigger_words_files_and_run_alike() -> None:
    assert training(subject="cat").words.names == {"pt1": ("my-cat", "my-cat-neg")}
    catalog = load("catalog", subject="cat")
    assert catalog["concept"]["dataset"]["filepath"] == "data/06_models/cat/concept.safetensors"
    assert catalog["reference_image"]["filepath"] == "data/01_raw/reference_images/cat.png"
    assert catalog["exported_files"]["dataset"]["path"] == "data/07_model_output/cat/export"
    assert load("parameters", subject="cat")["export"]["title"] == "cat"
    assert load("mlflow", subject="cat")["tracking"]["run"]["name"] == "cat"


def test_the_class_word_is_the_subject_unless_given() -> None:
    assert training(subject="owl").class_word == "owl"
    assert training(subject="mia", class_word="owl").class_word == "owl"


def test_a_picture_given_for_one_run_takes_the_place_of_the_subjects_own() -> None:
    assert load("catalog", image="/pictures/x.jpg")["reference_image"]["filepath"] == "/pictures/x.jpg"


def test_the_sd15_overlay_changes_only_what_differs() -> None:
    parameters = load("parameters", "sd15")
    assert parameters["ingestion"]["bucket"] == {"side_px": 512, "multiple_px": 64, "keep_aspect": False}
    assert (parameters["device"]["dtype"], parameters["training"]["num_steps"]) == ("bfloat16", 1000)


@pytest.mark.parametrize("method", METHODS)
def test_sdxls_second_text_encoder_is_trained_as_the_first(method: str) -> None:
    preset = training("sdxl", method=method)
    assert preset.lora.get("text_encoder_2", ()) == preset.lora.get("text_encoder", ())


def test_runs_go_to_a_database_inside_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = load("mlflow")["server"]["mlflow_tracking_uri"]
    assert uri == f"sqlite:///{PROJECT.as_posix()}/data/09_tracking/mlflow.db"


def test_runs_go_to_the_server_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://runs.example:5000")
    assert load("mlflow")["server"]["mlflow_tracking_uri"] == "http://runs.example:5000"


def test_the_catalog_names_the_files_that_parameters_name() -> None:
    single = {"positive": "cat.safetensors", "words": {"pt1": ["cat.pt", "cat-neg.pt"]}}
    loader = config_loader(training={"start_from": "old.safetensors"}, **{"import": single})
    loader["parameters"] = build_parameters(loader["parameters"])  # as in a run; without hooks, they are plain
    catalog = loader["catalog"]
    assert catalog["start_files"]["files"] == "old.safetensors"
    assert UserFilesDataset(path="/", files=catalog["import_files"]["files"])._describe() == {
        "files": ("cat.safetensors", "cat.pt", "cat-neg.pt")
    }
    assert catalog["toolkit_files"]["folder"] is None
    assert load("catalog", **{"import": {"toolkit": "run-1"}})["toolkit_files"]["folder"] == "run-1"


def test_presets_are_those_of_the_base_environment_for_the_settings_of_the_run() -> None:
    loader = config_loader("sd15", subject="cat", training={"num_steps": 3})
    preset = loader.presets({"subject": "cat", "method": "lora"}, ["training"])["training"]
    assert (preset["num_steps"], preset["guidance_scale"], preset["class_word"]) == (400, "1.0", "cat")
    assert loader["parameters"]["training"]["num_steps"] == 3
    assert loader["catalog"]["base_model"]["path"].startswith("hub:")  # globals are those of the environment again


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"a: " + b"[" * 1000 + b"]" * 1000, {"got": "too deeply"}),
        (b"_a0: x\n" + b"".join(b"_a%d: '%s'\n" % (i, b"${_a%d}" % (i - 1) * 10) for i in range(1, 12)), {"got": "_a"}),
        (b"_a: &a [1]\n_b: &b [*a,*a]\n" + b"_c: [" + b"*b," * 6000 + b"]\n", {"expected": "parameters.yml"}),
        (b"a: !!python/object/apply:os.system [id]", {"expected": "parameters.yml", "got": "python"}),
        (b"training: {seed: 1}\ntraining: {seed: 2}", {"expected": "parameters.yml", "got": "duplicate"}),
        (b"- 1", {"expected": "parameters.yml", "got": "list"}),
        (b"training: {class_word: caf\xe9}", {"expected": "UTF-8"}),
        (b"training: {seed: " + b"9" * 5000 + b"}", {"expected": "numbers"}),
    ],
    ids=["deep", "tenfold", "aliases", "python", "duplicate", "list", "latin-1", "digits"],
)
def test_a_file_of_the_configuration_that_cannot_be_read_is_named(
    tmp_path: Path, text: bytes, parts: dict[str, str]
) -> None:
    shutil.copytree("conf", tmp_path / "conf")
    (tmp_path / "conf/local").mkdir(exist_ok=True)
    (tmp_path / "conf/local/parameters.yml").write_bytes(text)
    loader = settings.ProjectConfigLoader(str(tmp_path / "conf"), "local", {}, **settings.CONFIG_LOADER_ARGS)
    with pytest.raises(InputError, check=says(**parts)):
        loader["parameters"]


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert load("mlflow")["server"]["mlflow_tracking_uri"].startswith("sqlite:///")


def test_the_value_of_a_variable_is_left_out_of_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", {})
    monkeypatch.setenv("MY_FOLDER", "/private/models")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://runs.example:5000")
    assert settings.environment("MY_FOLDER") == "/private/models"
    assert settings.environment("MLFLOW_TRACKING_URI") == "http://runs.example:5000"
    assert (
        redaction.redact("/private/models/a at http://runs.example:5000")
        == "${env:MY_FOLDER}/a at http://runs.example:5000"
    )


def test_environments_are_merged_as_kedro_merges_them() -> None:
    base = {"a": {"b": 1, "c": {"d": [1, {"e": 2}]}, "f": {"g": 1}}, "h": [1, 2], "i": "x"}
    over = {"a": {"c": {"d": [3]}, "f": None, "new": {"j": 1}}, "h": [3], "i": {"l": 2}, "m": r"\${x}"}
    expected = OmegaConfigLoader._soft_merge(base, over)
    assert settings.ProjectConfigLoader._soft_merge(base, over) == expected
    assert (base["i"], base["a"]["c"]) == ("x", {"d": [1, {"e": 2}]})
    # A mapping in place of a list: OmegaConf ends with a TypeError that names neither; here, the schema refuses it.
    assert settings.ProjectConfigLoader._soft_merge({"h": [1]}, {"h": {"k": 1}}) == {"h": {"k": 1}}
