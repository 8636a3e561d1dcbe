"""When a training is scored, which step is chosen, and which ones are kept."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from dreamartist_pipeline.core.choosing import (
    BUDGET,
    Bounds,
    Score,
    ScoringCost,
    choose_step,
    has_stalled,
    most_kept,
    rows_of_scores,
    scored_steps,
    thinned,
)
from dreamartist_pipeline.params import ScoringParams, TrainingParams

BOUNDS = Bounds(agreement=0.6, drift=0.5, copying=0.4)
UNMEASURED = dataclasses.replace(BOUNDS, agreement=None)
SCORING = {"prompts": ["a {pt1}, blue background"] * 4, "prior_prompts": ["a cat"] * 4, "images_per_prompt": 2}


def params(num_steps: int = 400, every: int | str = "auto", **changes: Any) -> TrainingParams:
    scoring = SCORING | {"every": every} | changes.pop("scoring", {})
    return TrainingParams(
        **{"num_steps": num_steps, "words": {"names": {"pt1": ("a-b", "a-b-neg")}}, "scoring": scoring},
        **{"choose": "best", **changes},
    )


def scores(*fidelities: float, agreement: float | None = 0.9, drift: float = 0.1, copying: float = 0.1) -> list[Score]:
    """Return scores of the steps 10, 20, …"""
    return [
        Score(10 * number, fidelity, agreement, drift, copying, 1.0) for number, fidelity in enumerate(fidelities, 1)
    ]


# --------------------------------------------------------------------------------------------- when


def test_the_cost_is_counted_in_rows_of_one_branch() -> None:
    """4 + 1 rows, forward and backward; 12 images of 6 steps; 8 + 8 validation rows; all in two branches."""
    assert ScoringCost.of(params()) == ScoringCost(step=5 * 2 * 2, base=12 * 6 * 2, scoring=12 * 6 * 2 + 16 * 2)
    plain = params(guidance_scale="1.0", regularization_batch_size=0)
    assert ScoringCost.of(plain) == ScoringCost(step=4 * 2, base=12 * 6 * 2, scoring=12 * 6 * 2 + 8)


@pytest.mark.parametrize("num_steps", [150, 399, 400, 401, 1000, 5000])
@pytest.mark.parametrize(
    "changes", [{}, {"guidance_scale": "1.0"}, {"batch_size": 64}, {"scoring": {"prompts": ["a"]}}]
)
def test_scoring_stays_within_its_budget_at_every_scored_step(num_steps: int, changes: dict[str, Any]) -> None:
    training = params(num_steps, **changes)
    cost, steps = ScoringCost.of(training), scored_steps(training)
    for number, step in enumerate(steps, start=1):
        assert cost.base + number * cost.scoring <= BUDGET * step * cost.step
    assert not steps or steps[-1] == num_steps
    assert len({after - before for before, after in itertools.pairwise(steps)}) <= 1


def test_a_training_of_400_steps_is_scored_every_60_steps() -> None:
    assert scored_steps(params()) == (160, 220, 280, 340, 400)


def test_a_training_too_short_for_two_scores_or_without_prompts_has_none() -> None:
    assert scored_steps(params(5)) == scored_steps(params(100)) == scored_steps(params(0)) == ()
    assert scored_steps(params(every=4, scoring={"prompts": [], "prior_prompts": []}, choose="last")) == ()
    assert scored_steps(params(every=0, choose="last")) == ()


def test_only_a_training_whose_concept_depends_on_scores_is_scored_unless_asked_for() -> None:
    assert scored_steps(params(choose="last")) == ()
    assert scored_steps(params(choose="last", every=200)) == (200, 400)
    assert scored_steps(params(choose="last", scoring={"patience": 2})) == scored_steps(params())


@pytest.mark.parametrize("needs", [{"choose": "best"}, {"choose": "last", "patience": 2}])
@pytest.mark.parametrize("missing", [{"every": 0}, {"prompts": [], "prior_prompts": []}])
def test_a_choice_without_scores_is_refused(needs: dict[str, Any], missing: dict[str, Any]) -> None:
    choose, patience = needs["choose"], needs.get("patience")
    with pytest.raises(ValueError, match=r"scoring.prompts.*scoring.every"):
        params(choose=choose, scoring={"patience": patience, **missing})


def test_a_given_interval_is_taken_with_the_last_step() -> None:
    assert scored_steps(params(10, every=4)) == (4, 8, 10)
    assert scored_steps(params(8, every=4)) == (4, 8)
    assert scored_steps(params(3, every=4)) == (3,)


# --------------------------------------------------------------------------------------------- the choice


def test_the_highest_fidelity_within_the_bounds_is_chosen() -> None:
    found = scores(0.5, 0.8, 0.7)
    assert choose_step(found, BOUNDS).step == 20
    for change in ({"agreement": 0.59}, {"drift": 0.51}, {"copying": 0.41}, {"drift": float("nan")}):
        beyond = [found[0], dataclasses.replace(found[1], **change), found[2]]
        choice = choose_step(beyond, BOUNDS)
        assert choice.step == 30 and choice.is_within_bounds
        assert next(iter(change)) in BOUNDS.passed(beyond[1])


def test_values_at_the_bounds_are_within_them_and_the_earlier_of_equal_steps_is_chosen() -> None:
    found = scores(0.8, 0.8, agreement=0.6, drift=0.5, copying=0.4)
    assert choose_step(found, BOUNDS).step == 10


def test_the_last_step_is_chosen_if_none_is_within_the_bounds() -> None:
    choice = choose_step(scores(0.9, 0.5, drift=2.0), BOUNDS)
    assert choice.step == 20 and not choice.is_within_bounds


def test_without_agreement_the_last_step_is_chosen_unless_it_passes_a_bound() -> None:
    found = scores(0.5, 0.9, 0.7, agreement=None)
    assert choose_step(found, UNMEASURED).step == 30
    copying = [*found[:2], dataclasses.replace(found[2], copying=0.9)]
    choice = choose_step(copying, UNMEASURED)
    assert choice.step == 20
    assert "copying" in choice.reason and "drift and" not in choice.reason


def test_the_reason_names_the_fidelity_of_the_chosen_and_of_the_last_step() -> None:
    reason = choose_step(scores(0.5, 0.8125, 0.75), BOUNDS).reason
    assert "0.812" in reason and "0.750" in reason and "3 of 3" in reason


def test_bounds_of_agreement_are_relative_to_the_base_model() -> None:
    scoring = ScoringParams(agreement_loss=0.5, max_drift=0.75, max_copying=0.4)
    assert Bounds.of(scoring, 0.75) == Bounds(agreement=0.375, drift=0.75, copying=0.4)
    assert Bounds.of(scoring, None) == Bounds(agreement=None, drift=0.75, copying=0.4)


def test_a_training_has_stalled_after_as_many_scores_without_a_better_one() -> None:
    def stalls(found: list[Score], patience: int | None) -> bool:
        return has_stalled(found, choose_step(found, BOUNDS), patience)

    found = scores(0.5, 0.8, 0.7, 0.7)
    assert [stalls(found[:n], 2) for n in range(1, 5)] == [False, False, False, True]
    assert not stalls(found, None)
    assert not stalls(scores(0.9, 0.5, 0.5, drift=2.0), 1)  # nothing good yet


# --------------------------------------------------------------------------------------------- what is kept


def test_steps_are_thinned_evenly_and_needed_ones_stay() -> None:
    assert thinned(range(1, 8), {7}, 7) == [1, 2, 3, 4, 5, 6, 7]
    kept: list[int] = []
    for step in range(10, 1010, 10):
        kept = thinned([*kept, step], {step, 130}, 20)
        assert len(kept) <= 20 and step in kept and (step < 130 or 130 in kept)
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert max(gaps) <= 100
    assert thinned(range(5), {1, 4}, 2) == [1, 4]


def test_twenty_concepts_or_half_a_gigabyte_are_kept_and_at_least_two() -> None:
    assert [most_kept(size) for size in (1, 25_000_000, 30_000_000, 10**9)] == [20, 20, 16, 2]


def test_a_table_of_scores_has_bounds_floor_and_the_chosen_step_in_every_row() -> None:
    first, second = rows_of_scores(scores(0.5, 0.8, drift=0.7), BOUNDS, {"fidelity": 0.3}, 20)
    assert (first["step"], first["chosen"], second["chosen"]) == (10, False, True)
    assert not first["within_bounds"]
    assert (second["drift_bound"], second["agreement_bound"], second["fidelity_of_base"]) == (0.5, 0.6, 0.3)
    assert "loss_regularization" not in first
