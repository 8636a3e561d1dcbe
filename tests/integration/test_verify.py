"""`kedro verify` on a project of its own: what a manifest holds, what has changed since, and a second training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dreamartist_pipeline.cli.verify import check_inside
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.manifest import MANIFEST, Manifest, RunManifest, StoredFile, read_manifest
from project_copy import copy_project
from refusals import says
from warm_processes import run_warm

TIMEOUT_S = 600
GIVEN = (
    "subject=x,image=stripes.png,base_model=tiny,prompt_database=prompts.parquet,training.num_steps=3,"
    "ingestion.bucket.side_px=32,ingestion.bucket.multiple_px=8,training.preview.every=0"
)
FILES = (
    *("reference_image", "prompt_database", "concept", "prepared_framing", "prepared_image", "prepared_mask"),
    *("regularization_prompts", "regularization_set", "training_history", "training_plan", "reconstruction"),
)


def kedro(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "KEDRO_ENV": "",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    }
    return run_warm(("-m", "kedro", *arguments), project, environment, TIMEOUT_S)


def verify(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return kedro(project, "verify", "x", "--env", "test", *options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    """Return a project with a concept; copy it before changing files."""
    project = copy_project(tmp_path_factory.mktemp("verified") / "project", tiny_base_model)
    Image.new("RGB", (32, 32), "orange").save(project / "stripes.png")
    result = kedro(project, "run", "--env", "test", "--pipeline", "train", "--params", GIVEN)
    assert result.returncode == 0, result.stderr[-3000:]
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the project, whose files a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "project", symlinks=True))


def manifest_of(project: Path) -> Manifest:
    manifest = read_manifest(project / "data/06_models/x" / MANIFEST)
    assert manifest is not None
    return manifest


def test_a_manifest_names_all_files_settings_versions_and_the_machine(trained: Path) -> None:
    run = manifest_of(trained).made_by
    files = run.inputs | run.outputs
    assert set(FILES) <= files.keys()
    assert not any(Path(file.path).is_absolute() for file in files.values())
    assert run.inputs["base_model"].sha256.startswith("sha256:")
    assert run.configuration["training"]["seed"] == 0 and run.configuration["subject"] == "x"
    assert {"torch", "diffusers", "dreamartist-pipeline"} <= run.versions.keys()
    assert run.machine["threads"] == "1" and run.machine.keys() == {"system", "device", "threads"}
    assert run.arguments[0] == "run" and GIVEN in run.arguments


def test_untouched_files_are_the_same(trained: Path) -> None:
    result = verify(trained)
    assert result.returncode == 0, result.stdout + result.stderr
    states = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert set(FILES) <= states.keys() and set(states.values()) == {"same"}


def replace_picture(project: Path) -> None:
    Image.new("RGB", (32, 32), "green").save(project / "stripes.png")


def edit_concept(project: Path) -> None:
    file = project / "data/06_models/x/concept.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")


def remove_history(project: Path) -> None:
    (project / "data/08_reporting/x/training_history.csv").unlink()


def edit_regularization_image(project: Path) -> None:
    next((project / "data/05_model_input/regularization").glob("*/000000.png")).write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "dataset", "state", "reason"),
    [
        (replace_picture, "reference_image", "changed", "a new training gives another concept"),
        (edit_concept, "concept", "changed", "replaced or edited"),
        (remove_history, "training_history", "missing", "The same command makes them again"),
        (edit_regularization_image, "regularization_set", "changed", "regularization_set"),
    ],
)
def test_a_difference_is_named_with_what_it_means(
    project: Path, change: Callable[[Path], None], dataset: str, state: str, reason: str
) -> None:
    change(project)
    result = verify(project)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("  ") and "same" not in line] == [[dataset, state]]
    assert any(reason in line for line in lines if not line.startswith("  "))


@pytest.mark.slow
def test_training_again_gives_the_same_bytes_and_touches_nothing(project: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (project / "data").rglob("*") if file.is_file()}
    result = verify(project, "--retrain")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert f"the same bytes: SHA-256 {manifest_of(project).concept_sha256}" in result.stdout
    assert {file: file.stat().st_mtime_ns for file in (project / "data").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("outside", ["concept", "history"])
def test_nothing_is_trained_again_whose_outputs_are_outside_the_project(tmp_path: Path, outside: str) -> None:
    """A copy of the project would have the same absolute path in its catalog, and replace the file."""
    run = RunManifest(
        arguments=("run",),
        ended="2026-11-26T09:00:00+00:00",
        mlflow_run=None,
        configuration={},
        inputs={},
        outputs={"history": StoredFile(path="/elsewhere/history" if outside == "history" else "history", sha256="0")},
        versions={},
        machine={},
    )
    concept = Path("/elsewhere") if outside == "concept" else tmp_path / "concept.safetensors"
    with pytest.raises(InputError, check=says(got="/elsewhere", remedy="--retrain")):
        check_inside(run, concept, tmp_path)


@pytest.mark.slow
def test_training_again_with_another_configuration_names_what_differs(project: Path) -> None:
    file = project / "conf/test/parameters.yml"
    (project / "conf/local/parameters.yml").write_text("")
    text = file.read_text()
    assert "training:" in text
    file.write_text(text.replace("training:", "training:\n  weight_decay: 0.5", 1))
    result = verify(project, "--retrain")
    assert result.returncode == 1
    assert "configuration.training.weight_decay: 0.001 → 0.5" in result.stdout


@pytest.mark.slow
def test_runs_that_use_the_concept_are_added_and_a_damaged_manifest_is_refused(project: Path) -> None:
    used = kedro(project, "run", "--env", "test", "--pipeline", "export", "--params", "subject=x,base_model=tiny")
    assert used.returncode == 0, used.stderr[-3000:]
    assert list(manifest_of(project).runs) == ["train", "export"]
    assert verify(project).returncode == 0

    file = project / "data/06_models/x" / MANIFEST
    file.write_text(json.dumps({"format": 99}))
    refused = verify(project)
    assert refused.returncode == 1 and str(file) in refused.stderr and "Traceback" not in refused.stderr


def test_a_subject_without_a_manifest_is_refused_with_what_to_do(trained: Path) -> None:
    result = kedro(trained, "verify", "nosuch", "--env", "test")
    assert result.returncode == 1
    assert "data/06_models/nosuch/manifest.json" in result.stderr and "kedro run --pipeline train" in result.stderr
