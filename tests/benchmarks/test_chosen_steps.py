"""The benchmark of the choice of the step: regret, differences over subjects, and what is done once."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from chosen.judging import OTHER, TOWERS, Judging, configured
from chosen.report import Judged, compare, figure, to_markdown
from markdown_tables import cells

GOOD = {"agreement": 0.9, "drift": 0.1, "copying": 0.1}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("chosen_steps")


def judged(fidelities: dict[int, tuple[float, float]], chosen: int, subject: str = "fox", **last: float) -> Judged:
    """Return a subject with these fidelities of each step, on both halves; `last` replaces values of the last step."""
    halves: dict[int, dict[str, list[dict[str, float]]]] = {}
    for step, both in fidelities.items():
        changed = last if step == max(fidelities) else {}
        values = [{"fidelity": fidelity, **GOOD, **changed} for fidelity in both]
        halves[step] = {TOWERS: values, OTHER: values}
    floor = {"fidelity": 0.25, "agreement": 1.0}
    return Judged(subject, chosen, halves, {TOWERS: floor, OTHER: floor}, {TOWERS: 0.75, OTHER: 0.75}, 100.0, 0.125)


def test_the_best_step_is_within_the_bounds() -> None:
    fidelities = {80: (0.5, 0.5), 120: (0.6, 0.6), 160: (0.7, 0.7)}
    assert judged(fidelities, 80).best(OTHER) == 160
    for beyond in ({"agreement": 0.7}, {"drift": 0.6}, {"copying": 0.6}):
        assert judged(fidelities, 80, **beyond).best(OTHER) == 120


def test_the_best_step_of_one_half_is_compared_on_the_other() -> None:
    noisy = judged({80: (0.5, 0.5), 120: (0.6, 0.4), 160: (0.4, 0.6)}, chosen=80)
    assert noisy.best(OTHER, 0) == 120 and noisy.best(OTHER, 1) == 160
    assert noisy.regret(OTHER) == pytest.approx(-0.1 / 0.5)  # each is bad where it was not chosen
    assert judged({80: (0.5, 0.5), 120: (0.6, 0.6)}, chosen=80).regret(OTHER) == pytest.approx(0.1 / 0.5)
    assert judged({80: (0.5, 0.5), 120: (0.6, 0.6)}, chosen=120).regret(OTHER) == 0


def test_the_chosen_step_is_compared_with_the_last_and_with_fixed_ones() -> None:
    first = judged({80: (0.5, 0.5), 120: (0.6, 0.6), 160: (0.4, 0.4)}, chosen=120)
    second = judged({80: (0.5, 0.5), 120: (0.4, 0.4), 160: (0.6, 0.6)}, chosen=160, subject="owl")
    outcomes = compare([first, second], fixed_step=80)
    by_title = {one.title: one for one in outcomes if one.tower == OTHER}
    last = by_title["fidelity, chosen - last"]
    assert last.by_subject == {"fox": pytest.approx(0.2), "owl": 0} and last.estimate.mean == pytest.approx(0.1)
    assert by_title["fidelity, chosen - step 80"].estimate.mean == pytest.approx(0.1)
    report = to_markdown([first, second], outcomes, {"images": 64})
    assert cells(report, "owl")[:4] == ["160", "160", "160", "160"]
    assert "images: 64" in report
    assert len(figure([first, second]).data) == 2 * 2 * 2


def test_prompts_and_seeds_are_not_those_of_the_scores() -> None:
    judging = Judging(env="test")
    scored, *halves = [configured("fox", "test").scoring, *(judging.params("fox", half).scoring for half in range(2))]
    for half in halves:
        assert not {*half.prompts, *half.prior_prompts} & {*scored.prompts, *scored.prior_prompts}
    seeds = [set(range(each.seed, each.seed + each.images_per_prompt)) for each in (scored, *halves)]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    assert judging.num_images >= 64


def test_a_training_is_run_once(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    codes = iter([1, 0])

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=next(codes))

    monkeypatch.setattr(subprocess, "run", run)
    training = bench.Training("fox", "cpu", tiny=True)
    with pytest.raises(SystemExit, match=r"chosen-tiny-fox\.log"):
        bench.train_if_needed(training, tmp_path)
    for _ in range(2):
        bench.train_if_needed(training, tmp_path)
    assert len(commands) == 2 and "training.choose=best" in commands[0][-3]
