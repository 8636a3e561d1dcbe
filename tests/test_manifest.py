"""The record of a concept's runs: what the hooks keep when a run does not make the concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.catalog import ProjectCatalog
from dreamartist_pipeline.hooks.manifest import MANIFEST, Manifest, ManifestHooks, RunManifest, read_manifest
from dreamartist_pipeline.hooks.story import file_sha256

EMPTY: dict[str, Any] = {"inputs": {}, "outputs": {}, "versions": {}, "machine": {}, "mlflow_run": None}
MEASURE = node(lambda concept: concept, "concept", "measures", name="measure")


def run(*arguments: str) -> RunManifest:
    return RunManifest(arguments=arguments, ended="2026-01-02", configuration={}, **EMPTY)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Return the manifest of a concept that a run of the default pipeline has made, and `evaluate` has used."""
    (tmp_path / "concept.json").write_text("1")
    runs = {"__default__": run("run"), "evaluate": run("run", "-p", "evaluate")}
    made = Manifest(subject="fox", concept_sha256=file_sha256(tmp_path / "concept.json"), runs=runs)
    (tmp_path / MANIFEST).write_text(made.model_dump_json())
    return tmp_path / MANIFEST


def end_run(manifest: Path, pipelines: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Let a run end that measures the concept; return the manifest after it."""
    monkeypatch.setattr(ManifestHooks, "run_so_far", lambda *_: run("run", "--nodes", "measure"))
    hooks = ManifestHooks()
    file = {"type": "json.JSONDataset", "filepath": str(manifest.with_name("concept.json"))}
    catalog = ProjectCatalog.from_config({"concept": file})
    hooks.after_pipeline_run(run_params={"pipeline_names": pipelines}, pipeline=Pipeline([MEASURE]), catalog=catalog)
    found = read_manifest(manifest)
    assert found is not None
    return found


def test_a_run_of_some_nodes_does_not_replace_the_run_that_made_the_concept(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = end_run(manifest, None, monkeypatch)
    assert found.made_by.arguments == ("run",)
    assert list(found.runs) == ["__default__", "evaluate", "__default__ (measure)"]


def test_a_later_run_of_a_pipeline_replaces_an_earlier_one(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = end_run(manifest, ["evaluate"], monkeypatch)
    assert {name: one.arguments for name, one in found.runs.items()} == {
        "__default__": ("run",),
        "evaluate": ("run", "--nodes", "measure"),
    }
