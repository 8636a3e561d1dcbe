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


def project(
    folder: Path, key: str = "key", concept: bytes = b"concept", pipeline: str = "train", ended: str = "1"
) -> Path:
    """Write the results of a subject on one machine."""
    contents = {CONCEPT: concept, f"{EXPORT}/lora/fox.safetensors": b"lora", SHEET: b"sheet"}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / STEPS).mkdir(exist_ok=True)
    write_manifest(folder, {"concept": CONCEPT, "export": EXPORT, "sheet": SHEET, "steps": STEPS}, key, pipeline, ended)
    return folder


def write_manifest(
    folder: Path, outputs: dict[str, str], key: str = "key", pipeline: str = "train", ended: str = "1"
) -> None:
    stored = {name: StoredFile(path=path, sha256=digest_of(folder / path)) for name, path in outputs.items()}
    run = RunManifest(
        arguments=(), ended=ended, mlflow_run=None, configuration={}, inputs={}, outputs=stored, versions={},
        machine={}, key=key,
    )  # fmt: skip
    manifest = Manifest(subject="fox", concept_sha256=digest_of(folder / CONCEPT), runs={pipeline: run})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


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
    ResultStore(first, url).publish(first / MANIFEST, makes_concept=True)
    assert copied == ["concept"]


def test_a_machine_with_an_earlier_concept_does_not_replace_a_later_one(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = project(tmp_path / "1", concept=b"earlier"), project(tmp_path / "2", concept=b"later")
    for folder in (first, second):
        ResultStore(folder, url).publish(folder / MANIFEST, makes_concept=True)
    ResultStore(first, url).publish(first / MANIFEST)  # after it has drawn with its own
    assert "Another machine has made another concept of fox" in caplog.text
    ResultStore(tmp_path / "3", url).fetch(tmp_path / "3" / MANIFEST)
    assert (tmp_path / "3" / CONCEPT).read_bytes() == b"later"


def test_runs_of_several_machines_with_one_concept_are_united(tmp_path: Path, url: str) -> None:
    for name, pipeline in {"1": "train", "2": "evaluate", "3": "train"}.items():
        folder = project(tmp_path / name, key=name, pipeline=pipeline, ended=name)
        ResultStore(folder, url).publish(folder / MANIFEST)
    last = tmp_path / "4"
    ResultStore(last, url).fetch(last / MANIFEST, "2")
    manifest = Manifest.model_validate_json((last / MANIFEST).read_bytes())
    assert {name: run.key for name, run in manifest.runs.items()} == {"train": "3", "evaluate": "2"}


def test_a_folder_that_has_lost_a_file_has_lost_it_everywhere(tmp_path: Path, url: str) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    project(first)
    (first / EXPORT / "old.txt").write_bytes(b"")
    write_manifest(first, {"concept": CONCEPT, "export": EXPORT})
    ResultStore(first, url).publish(first / MANIFEST)
    ResultStore(second, url).fetch(second / MANIFEST)
    assert (second / EXPORT / "old.txt").exists()
    (first / EXPORT / "old.txt").unlink()
    write_manifest(first, {"concept": CONCEPT, "export": EXPORT}, ended="2")
    ResultStore(first, url).publish(first / MANIFEST)
    ResultStore(second, url).fetch(second / MANIFEST)
    assert [path.name for path in (second / EXPORT).iterdir()] == ["lora"]


def test_results_that_were_replaced_by_hand_stay_where_they_are(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = project(tmp_path)
    (first / SHEET).write_bytes(b"another")
    ResultStore(first, url).publish(first / MANIFEST)
    assert "a.png is not as its manifest says" in caplog.text
    assert ObjectStore(url).find("data") == {}


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
def test_results_that_are_not_those_of_the_manifest_are_refused_and_change_nothing(
    tmp_path: Path, url: str, content: bytes | None, got: str
) -> None:
    first, second = project(tmp_path / "1", concept=b"new"), project(tmp_path / "2", concept=b"old")
    ResultStore(first, url).publish(first / MANIFEST)
    folder = ObjectStore(url).folder("data", "08_reporting", "fox")
    folder.remove("a.png")
    if content is not None:
        folder.write("a.png", content)
    (second / SHEET).write_bytes(b"own")
    before = files(second)
    with pytest.raises(InputError, check=says(expected="a.png", got=got)):
        ResultStore(second, url).fetch(second / MANIFEST)
    assert files(second) == before
    assert not [*second.rglob(".staged")]


OUTSIDE = ("data/06_models/fox/../../../outside", "/tmp/fox/x/outside", "data/06_models/owl/other", "src/x/fox/code.py")


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_manifest_in_the_store_cannot_name_files_elsewhere(tmp_path: Path, url: str, path: str) -> None:
    first, second = project(tmp_path / "1"), tmp_path / "2" / "inner"
    manifest = Manifest.model_validate_json((first / MANIFEST).read_bytes())
    run = manifest.runs["train"].model_copy(update={"outputs": {"concept": StoredFile(path=path, sha256="0")}})
    text = manifest.model_copy(update={"runs": {"train": run}}).model_dump_json()
    ObjectStore(url).folder(*MANIFEST.parent.parts).write("manifest.json", text.encode())
    ResultStore(second, url).fetch(second / MANIFEST)
    assert [*files(second)] == [MANIFEST.as_posix()]
    assert [*(tmp_path / "2").iterdir()] == [second]


def test_a_manifest_of_another_subject_is_refused(tmp_path: Path, url: str) -> None:
    first, owl = project(tmp_path / "1"), Path("data/06_models/owl/manifest.json")
    ObjectStore(url).folder(*owl.parent.parts).write("manifest.json", (first / MANIFEST).read_bytes())
    with pytest.raises(InputError, check=says(expected="a manifest of owl", got="one of fox")):
        ResultStore(tmp_path, url).fetch(tmp_path / owl)


def test_a_damaged_manifest_in_the_store_is_named(tmp_path: Path, url: str) -> None:
    ObjectStore(url).folder(*MANIFEST.parent.parts).write("manifest.json", json.dumps({"format": 1}).encode())
    with pytest.raises(InputError, check=says(expected=f"{url}/data/06_models/fox/manifest.json")):
        ResultStore(tmp_path, url).fetch(tmp_path / MANIFEST)
    first = project(tmp_path)
    ResultStore(first, url).publish(first / MANIFEST)  # replaces it
    ResultStore(tmp_path / "2", url).fetch(tmp_path / "2" / MANIFEST)
    assert files(tmp_path / "2") == {name: text for name, text in files(first).items() if not name.startswith("2/")}
