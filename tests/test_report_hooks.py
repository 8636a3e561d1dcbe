"""What the hooks hand to the report: what belongs to the concept, and None in place of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kedro.io import MemoryDataset
from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.catalog import ProjectCatalog
from dreamartist_pipeline.early_checks import optional_inputs
from dreamartist_pipeline.hooks.manifest import MANIFEST, Manifest, ManifestHooks, RunManifest, StoredFile
from dreamartist_pipeline.hooks.report import ReportHooks, _configuration
from dreamartist_pipeline.hooks.story import file_sha256
from dreamartist_pipeline.run_facts import RUN_FACTS


@optional_inputs("pictures", "curves")
def _report(concept: Any, facts: Any, pictures: Any = None, curves: Any = None) -> str:
    return ""


REPORT = node(_report, ["concept", RUN_FACTS, "pictures", "curves"], "report", name="report")
TRAIN = node(lambda image: (image, image), "image", ["concept", "curves"], name="train")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with a concept, its pictures and curves, and a manifest that names them."""
    for name in ("concept", "pictures", "curves"):
        (tmp_path / f"{name}.json").write_text(json.dumps(name))
    outputs = {name: _stored(tmp_path / f"{name}.json") for name in ("concept", "pictures", "curves")}
    manifest = Manifest(subject="fox", concept_sha256=outputs["concept"].sha256, runs={"train": _run(outputs=outputs)})
    (tmp_path / MANIFEST).write_text(manifest.model_dump_json())
    return tmp_path


def _run(**values: Any) -> RunManifest:
    empty: dict[str, Any] = {"inputs": {}, "outputs": {}, "versions": {}, "machine": {}, "mlflow_run": None}
    return RunManifest(**{"arguments": ("run",), "ended": "2026-01-02", "configuration": {}, **empty, **values})


def _stored(file: Path) -> StoredFile:
    return StoredFile(path=file.name, sha256=file_sha256(file))


def provided(project: Path, *nodes: Any) -> ProjectCatalog:
    """Return the catalog of a run of these nodes, as its runner finds it."""
    names = ("concept", "pictures", "curves", "recommended_settings")
    files = {name: str(project / f"{name}.json") for name in names}
    catalog = ProjectCatalog({RUN_FACTS: MemoryDataset()})
    for name, file in files.items():
        catalog[name] = ProjectCatalog.from_config({name: {"type": "json.JSONDataset", "filepath": file}})[name]
    hooks = ReportHooks(ManifestHooks())
    hooks._project = project
    hooks.before_pipeline_run(run_params={}, pipeline=Pipeline(list(nodes)), catalog=catalog)
    return catalog


def test_what_the_manifest_of_the_concept_names_is_read(project: Path) -> None:
    catalog = provided(project, REPORT)
    assert (catalog.load("pictures"), catalog.load("curves")) == ("pictures", "curves")
    assert catalog.provided == {RUN_FACTS}


def test_what_is_missing_is_none_and_exists_for_the_checks_before_the_run(project: Path) -> None:
    (project / "pictures.json").unlink()
    catalog = provided(project, REPORT)
    assert catalog.exists("pictures") and catalog.load("pictures") is None
    assert catalog.load("curves") == "curves"


def test_what_was_written_since_by_another_run_is_none(project: Path) -> None:
    (project / "pictures.json").write_text('"of something else"')
    assert provided(project, REPORT).load("pictures") is None


def test_results_of_an_earlier_concept_are_none(project: Path) -> None:
    (project / "concept.json").write_text('"trained again"')
    catalog = provided(project, REPORT)
    assert catalog.load("pictures") is catalog.load("curves") is None
    assert catalog.load("concept") == "trained again"


def test_a_run_that_makes_the_concept_reads_nothing_of_the_one_before(project: Path) -> None:
    catalog = provided(project, TRAIN, REPORT)
    assert catalog.load("pictures") is None
    assert "curves" not in catalog.provided  # the run makes them


def test_an_input_that_another_node_needs_is_left_to_the_checks(project: Path) -> None:
    (project / "pictures.json").unlink()
    needs = node(lambda pictures: pictures, "pictures", "sheet", name="needs")
    assert not provided(project, REPORT, needs).exists("pictures")


def test_settings_are_those_of_the_training_and_of_the_latest_evaluation() -> None:
    first = _run(configuration={"method": "lora", "evaluation": {"seed": 1}, "export": {"seed": 1}})
    later = _run(configuration={"method": "tutorial", "evaluation": {"seed": 2}})
    assert _configuration([first, later], first) == {
        "method": "lora",
        "evaluation": {"seed": 2},
        "export": {"seed": 1},
    }
    assert _configuration([later], None) == later.configuration


def test_other_nodes_can_do_without_inputs_too(project: Path) -> None:
    @optional_inputs("curves")
    def draw(concept: Any, curves: Any = None) -> Any:
        return curves

    generate = node(draw, ["concept", "curves"], "images", name="draw")
    assert provided(project, generate).load("curves") == "curves"
    (project / "curves.json").unlink()
    catalog = provided(project, generate)
    assert catalog.load("curves") is None
    assert catalog.provided == {"curves"}


def test_recommended_settings_name_their_concept_and_need_no_manifest(project: Path) -> None:
    @optional_inputs("recommended_settings")
    def draw(concept: Any, recommended_settings: Any = None) -> Any:
        return recommended_settings

    generate = node(draw, ["concept", "recommended_settings"], "images", name="draw")
    (project / MANIFEST).unlink()  # of a concept that was copied here, and evaluated
    assert provided(project, generate).load("recommended_settings") is None
    (project / "recommended_settings.json").write_text('{"concept_sha256": "00"}')
    assert provided(project, generate).load("recommended_settings") == {"concept_sha256": "00"}
    assert provided(project, TRAIN, generate).load("recommended_settings") is None


def test_runs_without_optional_inputs_are_left_alone(project: Path) -> None:
    assert not provided(project, TRAIN).provided
