"""Which trainings go on at a rung."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamartist_pipeline.core.halving import Halving, stopped_runs
from dreamartist_pipeline.params import HalvingParams


def halving(folder: Path, run: str, first: int = 10, factor: int = 3) -> Halving:
    return Halving(HalvingParams(folder=str(folder), run=run, first=first, factor=factor))


def goes_on(folder: Path, run: str, step: int, standing: float) -> bool:
    one = halving(folder, run)
    one.note(step, standing)
    return not one.is_stopped(step)


def test_the_first_one_goes_on_and_then_the_best_third(tmp_path: Path) -> None:
    standings = {"a": 0.5, "b": 0.4, "c": 0.6, "d": 0.55, "e": 0.58, "f": 0.59}
    outcomes = {run: goes_on(tmp_path, run, 10, standing) for run, standing in standings.items()}
    # Of 1 to 5 trainings one goes on, and of 6 two: f is the second best of 6, after c.
    assert outcomes == {"a": True, "b": False, "c": True, "d": False, "e": False, "f": True}
    assert stopped_runs(tmp_path) == {"b", "d", "e"}


def test_a_rung_is_passed_once_and_nothing_happens_before_the_first(tmp_path: Path) -> None:
    assert goes_on(tmp_path, "best", 10, 0.9)
    for step in (1, 9):
        assert goes_on(tmp_path, "late", step, 0.1)
    assert not (tmp_path / "1").exists() and len([*tmp_path.glob("*/late.json")]) == 0
    assert goes_on(tmp_path, "equal", 12, 0.9)
    assert goes_on(tmp_path, "equal", 29, 0.1)  # between two rungs
    assert goes_on(tmp_path, "best", 30, 0.9)
    assert not goes_on(tmp_path, "equal", 35, 0.1)


def test_notes_that_are_being_written_or_damaged_count_for_nothing(tmp_path: Path) -> None:
    goes_on(tmp_path, "best", 10, 0.9)
    (tmp_path / "10/.x.0123456789ab.partial.json").touch()
    (tmp_path / "10/.y.0123456789ab.partial.json").write_text('{"step": 10, "standing": 9, "is_stopped": true}')
    (tmp_path / "10/damaged.json").write_text("{")
    assert goes_on(tmp_path, "better", 10, 0.95)
    assert stopped_runs(tmp_path) == set()


def test_a_training_that_was_killed_after_its_note_is_stopped_when_it_gets_there_again(tmp_path: Path) -> None:
    goes_on(tmp_path, "best", 10, 0.9)
    assert not goes_on(tmp_path, "killed", 10, 0.1)
    assert not halving(tmp_path, "killed").is_stopped(9)


def test_a_training_that_goes_back_forgets_what_it_noted_later(tmp_path: Path) -> None:
    goes_on(tmp_path, "best", 10, 0.9)
    goes_on(tmp_path, "best", 30, 0.9)
    assert goes_on(tmp_path, "back", 10, 0.95)
    assert not goes_on(tmp_path, "back", 30, 0.1)
    assert goes_on(tmp_path, "back", 20, 0.9)
    assert goes_on(tmp_path, "back", 30, 0.99)
    assert not goes_on(tmp_path, "back", 10, 0.1)


@pytest.mark.parametrize("run", ["", "../a", "a/b"])
def test_a_run_is_named_as_a_file(run: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run"):
        halving(tmp_path, run)
