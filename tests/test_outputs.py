"""One run of a subject at a time, and files that belong together appear together."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline, node
from kedro_datasets.json import JSONDataset

import small_run
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.outputs import OutputHooks, check_folders, check_images_fit
from dreamartist_pipeline.locks import LocalLock, LockHeldError
from dreamartist_pipeline.params import GenerateParams
from dreamartist_pipeline.starting_runs import RUN_KEY
from dreamartist_pipeline.whole_files import STAGED, finish_publishing, publish
from refusals import says
from small_disks import mount_read_only, mount_small
from small_run import CONCEPT_SET, FILES
from warm_processes import WarmProgram, start_warm


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[WarmProgram]:
    """Start the small run as a program, and wait for its end."""
    with tempfile.TemporaryDirectory() as outputs:
        program = start_warm((small_run.__file__, str(folder), *arguments), folder, os.environ, Path(outputs))
        try:
            yield program
        finally:
            program.wait(timeout_s=60)


def wait_for_node(program: WarmProgram) -> None:
    while "waiting\n" not in program.read():
        assert not program.ends_within(0.01)


def texts(folder: Path) -> dict[str, str]:
    """Return the contents of the files that are there."""
    return {name: json.loads((folder / file).read_text()) for name, file in FILES.items() if (folder / file).exists()}


def strays(folder: Path) -> list[str]:
    """Return files that are no outputs; the lock file stays."""
    known = {*FILES.values(), "06/fox/.lock"}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.name == STAGED)
    return sorted(set(found) - known)


def test_a_run_writes_its_files_and_nothing_else(tmp_path: Path) -> None:
    small_run.run(tmp_path, "a")
    small_run.run(tmp_path, "b")
    assert texts(tmp_path) == dict.fromkeys(FILES, "b")
    assert not strays(tmp_path)


def test_datasets_are_told_when_their_files_are_in_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(
        JSONDataset,
        "published",
        lambda self: told.append((Path(self._filepath).name, json.loads(Path(self._filepath).read_text()))),
        raising=False,
    )
    small_run.run(tmp_path, "a")
    told.clear()
    small_run.run(tmp_path, "b")
    assert {Path(FILES[name]).name for name in CONCEPT_SET} <= {name for name, _ in told}
    assert {text for _, text in told} == {"b"}


@pytest.mark.parametrize("failing", ["train", "evaluate", "draw"])
def test_a_failed_run_leaves_whole_sets(tmp_path: Path, failing: str) -> None:
    small_run.run(tmp_path, "a")
    with pytest.raises(ZeroDivisionError):
        small_run.run(tmp_path, "b", fails_in=failing)
    found = texts(tmp_path)
    assert {found[name] for name in CONCEPT_SET} == {"a" if failing == "train" else "b"}
    assert {found["sheet"], found["metrics"]} <= {"a"} or failing == "draw"
    assert not strays(tmp_path)


def test_the_first_training_of_a_subject_shows_its_files_at_once(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        small_run.run(tmp_path, "a", fails_in="train")
    assert texts(tmp_path) == {"picture": "a", "plan": "a"}


def test_a_killed_training_leaves_the_earlier_set_and_the_next_one_nothing_of_it(tmp_path: Path) -> None:
    small_run.run(tmp_path, "a")
    with started(tmp_path, "b", "train") as program:
        wait_for_node(program)
        program.send(signal.SIGKILL)
    assert texts(tmp_path) == dict.fromkeys(FILES, "a")
    small_run.run(tmp_path, "a", nodes=("evaluate",))
    small_run.run(tmp_path, "c")
    assert texts(tmp_path) == dict.fromkeys(FILES, "c")
    assert not strays(tmp_path)


def test_runs_killed_at_random_moments_never_mix_sets(tmp_path: Path) -> None:
    chance, killed = random.Random(0), []
    with started(tmp_path, "0"):
        started_s = time.monotonic()
    duration_s = time.monotonic() - started_s
    for number in range(1, 7):
        with started(tmp_path, f"{number}") as program:
            time.sleep(chance.uniform(0.5, 1) * duration_s)
            program.send(signal.SIGKILL)
        killed.append(program.wait(timeout_s=60).returncode == -signal.SIGKILL)
        finish_publishing(tmp_path / "06/fox/.publishing.json")  # so that the next line knows the text
        small_run.run(tmp_path, texts(tmp_path)["concept"], nodes=("evaluate",))  # fails for the picture of another run
        assert len({texts(tmp_path)[name] for name in CONCEPT_SET}) == 1
    assert any(killed)
    small_run.run(tmp_path, "last")
    assert not strays(tmp_path)


@pytest.mark.parametrize("num_renamed", range(4))
def test_a_kill_between_the_renames_is_completed_by_the_next_run(
    tmp_path: Path, num_renamed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every moment between two renames of one set."""
    small_run.run(tmp_path, "a")
    counter = itertools.count()

    def replace(self: Path, target: Path) -> None:
        if STAGED in self.parts and next(counter) == num_renamed:
            raise KeyboardInterrupt  # nothing is cleaned up
        os.replace(self, target)

    files = [tmp_path / FILES[name] for name in CONCEPT_SET]
    for file in files:
        (file.parent / STAGED).mkdir(exist_ok=True)
        (file.parent / STAGED / file.name).write_text('"b"')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        publish(files, tmp_path / "06/fox/.publishing.json")
    assert len({texts(tmp_path)[name] for name in CONCEPT_SET}) == 1 + (num_renamed > 0)
    small_run.run(tmp_path, "b", nodes=("evaluate",))
    assert {texts(tmp_path)[name] for name in CONCEPT_SET} == {"b"}
    assert not strays(tmp_path)


def test_an_interruption_between_the_renames_is_completed_by_the_next_run_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run.run(tmp_path, "a")
    hooks, counter = OutputHooks(), itertools.count()

    def replace(self: Path, target: Path) -> None:
        if self.parent.name == STAGED != target.parent.name and next(counter) == 2:
            raise KeyboardInterrupt
        os.replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        small_run.run(tmp_path, "b", hooks=hooks)
    assert len({texts(tmp_path)[name] for name in CONCEPT_SET}) == 2
    small_run.run(tmp_path, "b", nodes=("evaluate",), hooks=hooks)
    assert {texts(tmp_path)[name] for name in CONCEPT_SET} == {"b"}
    assert not strays(tmp_path)


@pytest.mark.parametrize("text", ["", "[", "1", "[1]"])
def test_a_damaged_journal_is_named(tmp_path: Path, text: str) -> None:
    small_run.run(tmp_path, "a")
    (tmp_path / "06/fox/.publishing.json").write_text(text)
    with pytest.raises(InputError, check=says(expected=".publishing.json", remedy="delete")):
        small_run.run(tmp_path, "b")
    assert texts(tmp_path) == dict.fromkeys(FILES, "a")


def test_a_journal_of_files_in_a_removed_folder_is_finished(tmp_path: Path) -> None:
    small_run.run(tmp_path, "a")
    journal = tmp_path / "06/fox/.publishing.json"
    journal.write_text(json.dumps(["../../removed/a.json"]))
    small_run.run(tmp_path, "b")
    assert texts(tmp_path) == dict.fromkeys(FILES, "b")
    assert not journal.exists()


def test_a_second_run_of_the_subject_is_refused_at_once_and_named(tmp_path: Path) -> None:
    with started(tmp_path, "a", "train") as program:
        wait_for_node(program)
        with pytest.raises(LockHeldError, check=says(expected="the subject fox", got=f"{program.process}")):
            small_run.run(tmp_path, "b", nodes=("evaluate",))
        program.send(signal.SIGKILL)
    small_run.run(tmp_path, "b")
    assert texts(tmp_path) == dict.fromkeys(FILES, "b")


def test_a_started_run_waits_for_the_lost_one_that_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_KEY, "0")
    with started(tmp_path, "a", "train") as program:
        wait_for_node(program)
        threading.Timer(0.5, program.send, [signal.SIGKILL]).start()
        small_run.run(tmp_path, "b")
    assert texts(tmp_path) == dict.fromkeys(FILES, "b")


@pytest.mark.parametrize(("section", "protects"), [("pretrain", "base model"), ("judge", "judge")])
def test_a_second_training_of_a_model_of_all_subjects_is_refused(tmp_path: Path, section: str, protects: str) -> None:
    """Its parts would be mixed with those of the first."""
    catalog = DataCatalog({f"params:{section}": MemoryDataset(SimpleNamespace(checkpoints=str(tmp_path)))})
    pipeline = Pipeline([node(lambda params: params, f"params:{section}", "model", name="train")])
    hooks = OutputHooks()
    with LocalLock(tmp_path / ".lock", "").hold(), pytest.raises(LockHeldError, check=says(expected=protects)):
        hooks.before_pipeline_run(pipeline, catalog)
    hooks.before_pipeline_run(pipeline, catalog)
    with pytest.raises(LockHeldError):
        OutputHooks().before_pipeline_run(pipeline, catalog)
    hooks.after_pipeline_run()


# ------------------------------------------------------------------------------------------------- folders


def test_folders_that_are_to_be_created_are_checked_where_they_will_be(tmp_path: Path) -> None:
    check_folders([tmp_path / "a" / "b"])
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(InputError, check=says(expected=str(tmp_path / "a" / "b"), got=str(tmp_path / "a"))):
        check_folders([tmp_path / "a" / "b"])


def test_a_read_only_folder_is_found_before_the_run(tmp_path: Path) -> None:
    with mount_read_only(tmp_path / "02") as folder, pytest.raises(InputError, check=says(got=str(folder))):
        small_run.run(tmp_path, "a")
    assert not texts(tmp_path)


def test_a_read_only_concept_can_be_evaluated_by_one_run_at_a_time(tmp_path: Path) -> None:
    small_run.run(tmp_path, "a")
    (tmp_path / "06").rename(tmp_path / "models")
    with mount_read_only(tmp_path / "06", tmp_path / "models"):
        small_run.run(tmp_path, "a", nodes=("evaluate",))
        with LocalLock(tmp_path / "08/fox/.lock", "").hold(), pytest.raises(LockHeldError):
            small_run.run(tmp_path, "a", nodes=("evaluate",))


def test_a_full_disk_is_found_before_the_run(tmp_path: Path) -> None:
    with mount_small(tmp_path / "08") as folder, pytest.raises(InputError, check=says(expected=str(folder))):
        small_run.run(tmp_path, "a")
    assert not texts(tmp_path)


def test_images_that_will_not_fit_are_refused_before_they_are_drawn(tmp_path: Path) -> None:
    params = GenerateParams(prompts=("a", "b"), images_per_prompt=50, width=64, height=128)
    with mount_small(tmp_path / "07", "5m") as folder:
        check = says(expected=f"{folder / 'fox'} for 100 images", remedy="generate.images_per_prompt")
        with pytest.raises(InputError, check=check):
            check_images_fit(folder / "fox", params)  # 3 × 100 × 3 × 64 × 128 bytes
        check_images_fit(folder / "fox", params.model_copy(update={"images_per_prompt": 30}))
        assert not list(folder.iterdir())
