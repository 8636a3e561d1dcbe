"""Which runs are started: those that have not been finished with the same parameters and files before."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from kedro.framework.context import KedroContext
from kedro.io import DataCatalog, MemoryDataset
from PIL import Image

from dreamartist_pipeline import settings
from dreamartist_pipeline.cli.params import parse_params
from dreamartist_pipeline.errors import InputError, StoppedEarly
from dreamartist_pipeline.hooks import ProjectRuns, StartingHooks, register_project_root, starting
from dreamartist_pipeline.hooks.manifest import Manifest, RunManifest, StoredFile
from dreamartist_pipeline.hooks.starting import as_params
from dreamartist_pipeline.pipeline_registry import register_pipelines
from dreamartist_pipeline.starting_runs import (
    PARENT_RUN,
    RUN_KEY,
    RunCommand,
    RunOutcome,
    RunRequest,
    RunResult,
    Workers,
)
from project_copy import copy_project
from refusals import says


class Trainings:
    """An executor that writes what a finished run leaves: a concept and its manifest."""

    def __init__(self, project: Path, failing: tuple[str, ...] = ()) -> None:
        self.project, self.failing = project, failing
        self.num_workers = 1
        self.commands: list[RunCommand] = []

    def run(self, command: RunCommand) -> str | None:
        self.commands.append(command)
        if command.name in self.failing:
            return "expected a picture"
        folder = self.project / "data/06_models" / command.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "concept.safetensors").write_bytes(b"concept")
        empty: dict[str, Any] = {"configuration": {}, "inputs": {}, "versions": {}, "machine": {}}
        sha256 = hashlib.sha256(b"concept").hexdigest()
        concept = StoredFile(path=f"data/06_models/{command.name}/concept.safetensors", sha256=sha256)
        run = RunManifest(
            **empty,
            arguments=(),
            ended="",
            mlflow_run=None,
            outputs={"concept": concept, "reconstruction": StoredFile(path="removed.png", sha256="")},
            key=command.environment[RUN_KEY],
        )
        manifest = Manifest(subject=command.name, concept_sha256=sha256, runs={"train": run})
        (folder / "manifest.json").write_text(manifest.model_dump_json())
        return None

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("project"), tiny_base_model)
    Image.new("RGB", (32, 32), "orange").save(folder / "fox.png")
    for pattern in ("catalog_*", "parameters_pretrain*", "parameters_judge*"):  # not of these runs: they take time
        for file in folder.glob(f"conf/*/{pattern}.yml"):
            file.unlink()
    return folder


@pytest.fixture
def project(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the project, of which the configuration is read."""
    folder = Path(shutil.copytree(source, tmp_path / "project"))
    monkeypatch.setattr(starting, "pipelines", register_pipelines())
    monkeypatch.setattr(starting, "active_run_id", lambda: "parent")
    monkeypatch.setattr(starting, "_adopt", lambda *_: None)
    register_project_root(folder)
    return folder


def request(subject: str = "fox-a", **params: Any) -> RunRequest:
    files = {"image": "fox.png", "base_model": "tiny", "prompt_database": "prompts.parquet"}
    return RunRequest(
        subject, ("train", "evaluate"), {"subject": subject, **files, **params}, {"name": subject}, ("concept",)
    )


def start(
    project: Path, *requests: RunRequest, failing: tuple[str, ...] = (), given: Mapping[str, Any] | None = None
) -> tuple[tuple[RunOutcome, ...], list[RunCommand]]:
    """Start runs; return their outcomes, and the commands that were executed."""
    executor = Trainings(project, failing)
    loader = settings.ProjectConfigLoader(str(project / "conf"), env="test", **settings.CONFIG_LOADER_ARGS)
    runs = ProjectRuns(project, loader, ("--env", "test"), given, lambda _: executor)
    return runs.start(requests, Workers(threads=1)), executor.commands


def started(project: Path, *requests: RunRequest, **options: Any) -> set[str]:
    return {command.name for command in start(project, *requests, **options)[1]}


def test_a_finished_run_is_not_repeated_and_a_failed_one_is(project: Path) -> None:
    wanted = request("fox-a"), request("fox-b")
    outcomes, _ = start(project, *wanted, failing=("fox-b",))
    assert [(one.subject, one.labels, one.message) for one in outcomes] == [
        ("fox-a", {"name": "fox-a"}, None),
        ("fox-b", {"name": "fox-b"}, "expected a picture"),
    ]
    assert started(project, *wanted) == {"fox-b"}
    assert started(project, *wanted) == set()


def test_a_changed_parameter_repeats_the_runs_that_have_it(project: Path) -> None:
    start(project, request("fox-a"), request("fox-b"))
    other = {"training": {"num_steps": 3}}
    assert started(project, request("fox-a", **other), request("fox-b")) == {"fox-a"}
    assert started(project, request("fox-a", **other), request("fox-b")) == set()


def test_a_changed_configuration_file_repeats_what_depends_on_it(project: Path) -> None:
    wanted = request("fox-a", method="lora"), request("fox-b", method="dreamartist")
    start(project, *wanted)
    file = project / "conf/base/parameters_training.yml"
    text, section = file.read_text(), "  # LoRA: no trigger word"
    file.write_text(text.replace(section, "  # remark"))
    assert started(project, *wanted) == set()
    part = text[text.index(section) : text.index("  # DreamBooth by LoRA")]
    file.write_text(text.replace(part, part.replace("lr: 3.0e-3", "lr: 2.0e-3")))
    assert started(project, *wanted) == {"fox-a"}


@pytest.mark.parametrize("changed", ["fox.png", "fox.txt", "prompts.parquet", "tiny/unet/config.json"])
def test_changed_contents_of_a_file_repeat_the_run(project: Path, changed: str) -> None:
    start(project, request())
    with (project / changed).open("ab") as file:
        file.write(b" ")
    assert started(project, request()) == {"fox-a"}


def test_changed_contents_of_a_start_concept_repeat_the_run(project: Path) -> None:
    (project / "start.safetensors").write_bytes(b"one")
    wanted = request(training={"start_from": str(project / "start.safetensors")})
    start(project, wanted)
    assert started(project, wanted) == set()
    (project / "start.safetensors").write_bytes(b"two")
    assert started(project, wanted) == {"fox-a"}


def test_another_place_of_the_same_picture_does_not(project: Path) -> None:
    start(project, request())
    (project / "fox.png").rename(project / "moved.png")
    assert started(project, request(image=str(project / "moved.png"))) == set()


@pytest.mark.parametrize("file", ["manifest.json", "concept.safetensors"])
def test_a_run_whose_files_are_gone_or_damaged_is_repeated(project: Path, file: str) -> None:
    start(project, request())
    (project / "data/06_models/fox-a" / file).unlink()
    assert started(project, request()) == {"fox-a"}
    (project / "data/06_models/fox-a/manifest.json").write_text("{")
    assert started(project, request()) == {"fox-a"}
    (project / "data/06_models/fox-a/concept.safetensors").write_bytes(b"that of another command")
    assert started(project, request()) == {"fox-a"}


def test_a_signal_stops_what_runs_and_the_same_command_continues(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()
    monkeypatch.setattr(Trainings, "close", lambda _: stopped.set())
    run = Trainings.run

    def interrupted(executor: Trainings, command: RunCommand) -> str | None:
        if command.name == "fox-a":
            return run(executor, command)
        signal.raise_signal(signal.SIGTERM)  # the handler is called in the main thread
        stopped.wait()
        return "exit status -15"

    wanted = [request(f"fox-{name}") for name in "abc"]
    with monkeypatch.context() as patch, pytest.raises(StoppedEarly, match="after 1 of 3 runs") as ended:
        patch.setattr(Trainings, "run", interrupted)
        start(project, *wanted)
    assert ended.value.exit_code == 130
    assert started(project, *wanted) == {"fox-b", "fox-c"}


def test_progress_is_told_of_what_was_left_at_the_start(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(project, request("fox-b"))
    stopped = threading.Event()
    monkeypatch.setattr(Trainings, "close", lambda _: stopped.set())

    def interrupted(_: Trainings, __: RunCommand) -> str:
        signal.raise_signal(signal.SIGTERM)
        stopped.wait()
        return "exit status -15"

    monkeypatch.setattr(Trainings, "run", interrupted)
    with pytest.raises(StoppedEarly, match="after 0 of 1 runs"):
        start(project, request("fox-a"), request("fox-b"))


def test_where_a_run_is_executed_does_not_matter_and_its_precision_does(project: Path) -> None:
    start(project, request(device={"device": "cuda"}))
    assert started(project, request(device={"device": "cpu"})) == set()
    assert started(project, request(device={"dtype": "bfloat16"})) == {"fox-a"}


def test_results_can_be_copied_to_another_machine(project: Path, tmp_path: Path) -> None:
    wanted = request(evaluation={"views": ["tiny_views"]})
    (project / "tiny_views").mkdir()
    shutil.copy(project / "fox.png", project / "tiny_views")
    start(project, wanted)
    other = Path(shutil.copytree(project, tmp_path / "elsewhere/project"))
    shutil.rmtree(project)
    register_project_root(other)
    assert started(other, wanted) == set()


def test_invalid_parameters_are_refused_before_anything_is_started(project: Path) -> None:
    executor = Trainings(project)
    loader = settings.ProjectConfigLoader(str(project / "conf"), env="test", **settings.CONFIG_LOADER_ARGS)
    runs = ProjectRuns(project, loader, executor=lambda _: executor)
    for wrong, text in ({"training": {"num_stepz": 1}}, "num_stepz"), ({"method": "nosuch"}, "nosuch"):
        with pytest.raises(InputError, check=says(where="fox-b", got=text)):
            runs.start([request("fox-a"), request("fox-b", **wrong)], Workers())
    with pytest.raises(InputError, check=says(where="a fox/b", got="a fox/b")):
        runs.start([request("fox-a"), request("a fox/b")], Workers())
    assert not executor.commands


def test_the_command_of_a_run_has_its_parameters_environment_and_parent(project: Path) -> None:
    groups = [{"lr": 1e-3, "rank": 2, "branch": "p", "layers": [r"re:.*\.attn.?$"]}]
    wanted = {"caption": "a, b=c", "training": {"lora_unet": groups, "templates": ["a {pt1}, {caption}"]}}
    _, (command,) = start(project, request(**wanted))
    assert command.arguments[:-1] == ("--pipelines", "train,evaluate", "--env", "test", "--params")
    assert parse_params(None, None, command.arguments[-1]) == request(**wanted).params  # type: ignore[arg-type]
    assert command.folder == project
    assert command.environment | {RUN_KEY: ""} == {
        RUN_KEY: "",
        PARENT_RUN: "parent",
        "MLFLOW_RUN_ID": None,
        "OMP_NUM_THREADS": "1",
    }
    assert command.log == project / "data/09_tracking/run_logs/fox-a.log"


def test_parameters_of_the_starting_command_are_those_of_every_run(project: Path) -> None:
    given = {"compare": {"workers": 2}, "subject": "x", "vae": "v", "training": {"num_steps": 3}}
    _, (command,) = start(project, request(training={"seed": 5, "num_steps": 9}), given=given)
    params = parse_params(None, None, command.arguments[-1])  # type: ignore[arg-type]
    assert (params["subject"], params["vae"], params["training"]) == ("fox-a", "v", {"seed": 5, "num_steps": 3})
    assert "compare" not in params


def test_parameters_of_the_starting_command_must_not_make_different_runs_equal(project: Path) -> None:
    wanted = [request(f"fox-{seed}", training={"seed": seed, "num_steps": 9}) for seed in (0, 1)]
    assert started(project, *wanted, given={"training": {"num_steps": 3}}) == {"fox-0", "fox-1"}
    with pytest.raises(InputError, check=says(got="training.seed=3", remedy="training.seed")):
        start(project, *wanted, given={"training": {"seed": 3}})


def test_an_environment_for_such_runs_has_the_values_of_all_sources_but_none_of_a_subject(project: Path) -> None:
    (project / "conf/own").mkdir()
    (project / "conf/own/parameters.yml").write_text("training: {num_steps: 5, words: {lr: '${_rate}'}}\n_rate: 0.1\n")
    (project / "conf/own/globals.yml").write_text("method: lora\nvae: v\n")
    loader = settings.ProjectConfigLoader(str(project / "conf"), env="own", **settings.CONFIG_LOADER_ARGS)
    given = {"training": {"seed": 3}, "base_model": "b", "subject": "x", "sweep": {"trials": 2}}
    runs = ProjectRuns(project, loader, given=given)
    parameters, run_settings = runs.environment_of(dict(request(training={"num_steps": 7}, method="t-lora").params))
    assert parameters == {"training": {"num_steps": 7, "words": {"lr": "${_rate}"}, "seed": 3}, "_rate": 0.1}
    assert run_settings == {
        **{"method": "t-lora", "vae": "v", "base_model": "tiny", "prompt_database": "prompts.parquet"}
    }


class TwoRuns:
    """A source of two runs, of which the second depends on what the first has measured."""

    def __init__(self) -> None:
        self.results: list[RunResult] = []

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[RunRequest]:
        yield request("fox-0")
        yield request("fox-1", training={"seed": len(self.results)})

    def examples(self) -> Sequence[RunRequest]:
        return [request("fox-0")]

    def ended(self, result: RunResult) -> None:
        self.results.append(result)


def test_a_source_is_told_of_every_run_also_of_those_that_had_finished(project: Path) -> None:
    for executed in ({"fox-0", "fox-1"}, set()):
        executor, source = Trainings(project), TwoRuns()
        loader = settings.ProjectConfigLoader(str(project / "conf"), env="test", **settings.CONFIG_LOADER_ARGS)
        outcomes = ProjectRuns(project, loader, executor=lambda _, it=executor: it).start(source, Workers())
        assert {command.name for command in executor.commands} == executed
        names = [one.subject for one in outcomes]
        assert names == [one.outcome.subject for one in source.results] == ["fox-0", "fox-1"]


def test_a_run_of_a_source_that_is_invalid_has_failed_and_the_others_go_on(project: Path) -> None:
    class OneInvalid(TwoRuns):
        def __iter__(self) -> Iterator[RunRequest]:
            yield request("fox-0", training={"num_stepz": 1})
            yield request("fox-1")

    executor, source = Trainings(project), OneInvalid()
    loader = settings.ProjectConfigLoader(str(project / "conf"), env="test", **settings.CONFIG_LOADER_ARGS)
    refused, finished = ProjectRuns(project, loader, executor=lambda _: executor).start(source, Workers())
    assert "num_stepz" in str(refused.message) and finished.message is None
    assert [command.name for command in executor.commands] == ["fox-1"]
    assert [one.outcome for one in source.results] == [refused, finished]


def test_examples_of_a_source_are_checked_before_anything_is_started(project: Path) -> None:
    source = TwoRuns()
    source.examples = lambda: [request("fox-0", training={"num_stepz": 1})]  # type: ignore[method-assign]
    executor = Trainings(project)
    loader = settings.ProjectConfigLoader(str(project / "conf"), env="test", **settings.CONFIG_LOADER_ARGS)
    with pytest.raises(InputError, check=says(where="fox-0", got="num_stepz")):
        ProjectRuns(project, loader, executor=lambda _: executor).start(source, Workers())
    assert not executor.commands


def test_a_finished_run_becomes_a_child_of_the_new_parent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(project, request())
    file = project / "data/06_models/fox-a/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["runs"]["train"]["mlflow_run"] = "child"
    file.write_text(json.dumps(manifest))
    adopted: list[tuple[str, str]] = []
    monkeypatch.setattr(starting, "_adopt", lambda *ids: adopted.append(ids))
    start(project, request())
    assert adopted == [("child", "parent")]


@pytest.mark.parametrize(
    "params",
    [
        {"subject": "fox", "image": "it's.png", "mask": None},
        {"training": {"guidance_scale": "3.0", "words": {"lr": 1e-05, "names": {"pt1": ["a", "b"]}}}},
        {"generate": {"prompts": ["a {pt1}, x=1", 'say "no"'], "negative_prompt": "blurry, seed=3"}},
        {"generate": {"negative_prompt": 'a "b", seed=3 \\', "prompts": ['"', "\\"]}},
        {"device": {"device": "cpu"}, "evaluation": {"text_image_model": None, "color_agreement": True}},
    ],
)
def test_parameters_are_written_as_the_command_line_reads_them(params: dict[str, Any]) -> None:
    assert parse_params(None, None, as_params(params)) == params  # type: ignore[arg-type]


@pytest.mark.parametrize(("env", "options"), [(None, ()), ("test", ("--env", "test"))])
def test_the_hook_hands_the_starter_to_nodes(tmp_path: Path, env: str | None, options: tuple[str, ...]) -> None:
    loader = SimpleNamespace(conf_source=str(tmp_path / "conf"), given_params={})
    hooks = StartingHooks()
    hooks.after_context_created(
        cast(KedroContext, SimpleNamespace(project_path=tmp_path, env=env, config_loader=loader))
    )
    catalog = DataCatalog({"run_starter": MemoryDataset(copy_mode="assign")})
    hooks.after_catalog_created(catalog)
    assert catalog.load("run_starter")._options == options
    hooks.after_catalog_created(DataCatalog())  # without pipelines that start runs
