"""Results in a store: what a manifest names is there as on the machine that made it, and comes from there to others."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.manifest import Manifest, RunManifest, StoredFile, digest_of
from dreamartist_pipeline.hooks.store import ResultStore
from dreamartist_pipeline.object_stores import ObjectStore
from refusals import says

CONCEPT, EXPORT, SHEET = "data/06_models/fox/concept", "data/07_model_output/fox/export", "data/08_reporting/fox/a.png"
STEPS = "data/06_models/fox/steps"  # an empty folder
MANIFEST = Path("data/06_models/fox/manifest.json")


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(4)}"


def project(folder: Path, key: str = "key", concept: bytes = b"concept") -> Path:
    """Write the results of a subject on one machine."""
    contents = {CONCEPT: concept, f"{EXPORT}/lora/fox.safetensors": b"lora", SHEET: b"sheet"}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / STEPS).mkdir(exist_ok=True)
    outputs = {
        name: StoredFile(path=path, sha256=digest_of(folder / path))
        for name, path in {"concept": CONCEPT, "export": EXPORT, "contact_sheet": SHEET, "steps": STEPS}.items()
    }
    write_manifest(folder, outputs, key)
    return folder


def write_manifest(folder: Path, outputs: dict[str, StoredFile], key: str) -> None:
    run = RunManifest(
        arguments=(), ended="", mlflow_run=None, configuration={}, inputs={}, outputs=outputs, versions={}, machine={},
        key=key,
    )  # fmt: skip
    manifest = Manifest(subject="fox", concept_sha256="", runs={"train": run})
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_machine_gets_the_same_files(tmp_path: Path, url: str) -> None:
    first, second = project(tmp_path / "1"), tmp_path / "2"
    ResultStore(first, url).publish(first / MANIFEST)
    ResultStore(second, url).fetch(second / MANIFEST)
    assert files(second) == files(first) and (second / STEPS).is_dir()


def test_only_what_has_changed_is_copied(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = project(tmp_path)
    ResultStore(first, url).publish(first / MANIFEST)
    project(first, concept=b"trained again")
    copied, copy = [], ObjectStore.copy_to
    monkeypatch.setattr(ObjectStore, "copy_to", lambda *given: copied.append(given[1]) or copy(*given))
    ResultStore(first, url).publish(first / MANIFEST)
    assert copied == ["concept", "manifest.json"]


def test_results_replace_others_only_if_they_are_of_the_run_that_is_asked_for(tmp_path: Path, url: str) -> None:
    first, second = project(tmp_path / "1", key="new", concept=b"new"), project(tmp_path / "2", key="old")
    before = files(second)
    store = ResultStore(second, url)
    store.fetch(second / MANIFEST, "new")
    assert files(second) == before  # the store has nothing
    ResultStore(first, url).publish(first / MANIFEST)
    store.fetch(second / MANIFEST, "another")
    assert files(second) == before
    store.fetch(second / MANIFEST, "new")
    assert files(second) == files(first)


@pytest.mark.parametrize(("content", "got"), [(b"of a later run", "another file"), (None, "no file")])
def test_results_that_are_not_those_of_the_manifest_are_refused_and_do_not_count(
    tmp_path: Path, url: str, content: bytes | None, got: str
) -> None:
    first, second = project(tmp_path / "1"), tmp_path / "2"
    ResultStore(first, url).publish(first / MANIFEST)
    folder = ObjectStore(url).folder("data", "08_reporting", "fox")
    folder.remove("a.png")
    if content is not None:
        folder.write("a.png", content)
    with pytest.raises(InputError, check=says(expected="a.png", got=got)):
        ResultStore(second, url).fetch(second / MANIFEST)
    assert not (second / MANIFEST).exists() and not (second / CONCEPT).exists()


@pytest.mark.parametrize("path", ["../fox/outside", "data/fox/../../outside", "/tmp/fox/outside", "data/owl/other"])
def test_a_manifest_in_the_store_cannot_name_files_elsewhere(tmp_path: Path, url: str, path: str) -> None:
    first, second = project(tmp_path / "1"), tmp_path / "2" / "inner"
    write_manifest(first, {"concept": StoredFile(path=path, sha256="0")}, "key")
    folder = ObjectStore(url).folder(*MANIFEST.parent.parts)
    folder.write("manifest.json", (first / MANIFEST).read_bytes())
    ResultStore(second, url).fetch(second / MANIFEST)
    assert [*files(second)] == [MANIFEST.as_posix()]
    assert [*(tmp_path / "2").iterdir()] == [second]


def test_a_damaged_manifest_in_the_store_is_named(tmp_path: Path, url: str) -> None:
    ObjectStore(url).folder(*MANIFEST.parent.parts).write("manifest.json", json.dumps({"format": 1}).encode())
    with pytest.raises(InputError, check=says(expected=f"{url}/data/06_models/fox/manifest.json")):
        ResultStore(tmp_path, url).fetch(tmp_path / MANIFEST)
