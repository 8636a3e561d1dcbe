"""Runs that are started by another one, in processes of their own, with a tiny base model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from PIL import Image

from dreamartist_pipeline import settings
from dreamartist_pipeline.executors.local import LocalWorkers
from dreamartist_pipeline.hooks import ProjectRuns, register_project_root, starting
from dreamartist_pipeline.hooks.manifest import read_manifest
from dreamartist_pipeline.params import CompareParams
from dreamartist_pipeline.pipeline_registry import register_pipelines
from dreamartist_pipeline.pipelines.compare.planning import compared_runs
from dreamartist_pipeline.starting_runs import RUN_KEY, RunCommand, RunOutcome, Workers
from project_copy import copy_project
from warm_processes import run_warm

_TIMEOUT_S = 600
COMPARED = {
    "methods": {"lora": {"title": "LoRA"}},
    "reference": "lora",
    "subjects": ["dot", "gone"],
    "images": "pictures",
    "workers": 1,
    "measures": {"fidelity": "similarity/concept.efficientnet-lite0", "controllability": "x", "drift": "y"},
    "columns": ["x"],
    "params": {
        "base_model": "tiny",
        "prompt_database": "prompts.parquet",
        "ingestion": {"bucket": {"side_px": 32, "multiple_px": 8}},
        "training": {"preview": {"every": 0}},
        "evaluation": {"branch_images": 0, "guidance_images": 0, "attention_images": 0, "sweep": {"images": 0}},
    },
}


SWEEP = """
name: rates
space:
  training:
    words: {lr: {low: 1.0e-3, high: 3.0e-2, log: true}}
    guidance_scale: ["2.0", "3.0"]
trials: 3
subjects: [dot]
images: pictures
halving: {first: 2, factor: 2}
params:
  base_model: tiny
  prompt_database: prompts.parquet
  ingestion: {bucket: {side_px: 32, multiple_px: 8}}
  training: {num_steps: 4, scoring: {every: 2}}
"""


class CountedWorkers(LocalWorkers):
    """Notes the names of what is executed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def run(self, command: RunCommand) -> str | None:
        self.names.append(command.name)
        environment = {"KEDRO_ENV": "", "MLFLOW_TRACKING_URI": None, **command.environment}
        return super().run(replace(command, environment=environment))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("project"), tiny_base_model)
    (folder / "pictures").mkdir()
    Image.new("RGB", (32, 32), "orange").save(folder / "pictures/dot.png")
    return folder


@pytest.fixture
def parent(project: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(starting, "pipelines", register_pipelines())
    monkeypatch.setattr(starting, "active_run_id", lambda: "0" * 32)
    monkeypatch.setattr(starting, "_adopt", lambda *_: None)
    register_project_root(project)
    return "0" * 32


def start(project: Path, **changes: Any) -> tuple[list[str], dict[str, RunOutcome]]:
    """Start a comparison; return the names of the runs that were executed, and all outcomes."""
    loader = settings.ProjectConfigLoader(str(project / "conf"), env="test", **settings.CONFIG_LOADER_ARGS)
    executor = CountedWorkers()
    runs = ProjectRuns(project, loader, ("--env", "test"), executor=lambda _: executor)
    params = CompareParams.model_validate(COMPARED | changes)
    outcomes = runs.start(compared_runs(params), Workers(threads=1))
    return executor.names, {one.subject: one for one in outcomes}


@pytest.mark.slow
def test_a_method_on_two_subjects_of_which_one_fails(project: Path, parent: str) -> None:
    names, outcomes = start(project)
    assert sorted(names) == ["dot-lora-0", "gone-lora-0"]
    assert {name for name, one in outcomes.items() if one.message is None} == {"dot-lora-0"}
    assert "gone.png" in str(outcomes["gone-lora-0"].message)
    assert (project / "data/08_reporting/dot-lora-0/evaluation_metrics.json").is_file()
    manifest = read_manifest(project / "data/06_models/dot-lora-0/manifest.json")
    assert manifest is not None
    assert {len(run.key or "") for run in manifest.runs.values()} == {64} and RUN_KEY not in os.environ
    client = mlflow.MlflowClient(f"sqlite:///{project}/data/09_tracking/mlflow.db")
    experiment = client.get_experiment_by_name("dreamartist")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.data.tags["subject"] for run in children} >= {"dot-lora-0"}

    names, _ = start(project, subjects=["dot"])
    assert names == []


@pytest.mark.slow
def test_subjects_of_a_table_are_personalized_and_one_that_cannot_be_read_is_listed(project: Path) -> None:
    Image.new("RGB", (32, 32), "navy").save(project / "pictures/ink.png")
    (project / "pictures/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    table = "subject,image,training.num_steps\nink,ink.png,1\ntorn,torn.png,1\n"
    (project / "pictures/all.csv").write_text(table)
    given = "base_model=tiny,prompt_database=prompts.parquet,ingestion.bucket.side_px=32,personalize.export=false"
    arguments = ("-m", "kedro", "personalize", "pictures/all.csv", "--env", "test", "--threads", "1", "--params", given)
    environment = {**os.environ, "KEDRO_ENV": ""}
    environment.pop("MLFLOW_TRACKING_URI", None)
    result = run_warm(arguments, project, environment, _TIMEOUT_S)
    assert result.returncode == 1
    assert "torn" in result.stderr and "1 that failed" in result.stderr
    page = (project / "data/08_reporting/personalize/subjects.html").read_text()
    assert 'id="ink"' in page and "Failed: 1" in page and "data:image/webp" in page


@pytest.mark.slow
def test_the_environment_of_a_sweep_repeats_its_best_score_and_a_second_call_runs_nothing(project: Path) -> None:
    (project / "rates.yml").write_text(SWEEP)
    environment = {**os.environ, "KEDRO_ENV": ""}
    environment.pop("MLFLOW_TRACKING_URI", None)

    def kedro(*arguments: str) -> str:
        result = run_warm(("-m", "kedro", *arguments), project, environment, _TIMEOUT_S)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stderr + result.stdout

    sweep = ("sweep", "rates.yml", "--env", "test", "--threads", "1")
    kedro(*sweep)
    table = pd.read_csv(project / "data/08_reporting/sweeps/rates/trials.csv")
    assert len(table) == 3 and table["state"][0] == "finished"
    parameters = "subject=again,class_word=dot,image=pictures/dot.png"
    kedro("run", "--pipelines", "train,evaluate", "--env", "best-rates", "--params", parameters)
    metrics = json.loads((project / "data/08_reporting/again/evaluation_metrics.json").read_text())
    assert metrics["similarity/concept.efficientnet-lite0"] == table["score"][0]
    assert "3 of" not in (said := kedro(*sweep)) and "runs:" not in said
    assert pd.read_csv(project / "data/08_reporting/sweeps/rates/trials.csv").equals(table)
