"""Compare chosen, last, fixed and best steps over subjects: estimates, a table, and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from chosen.judging import OTHER, TOWERS
from dreamartist_pipeline.core.choosing import Bounds, Score
from dreamartist_pipeline.core.intervals import Estimate, bootstrap_mean
from dreamartist_pipeline.params import ScoringParams

Values = Mapping[str, float]
"""Name of a score -> its value."""
_MEASURES = ("fidelity", "agreement", "drift", "copying")
_COLORS = {TOWERS: "#0072b2", OTHER: "#009e73"}  # of Okabe and Ito
_CHOSEN = "#d55e00"
_COLUMNS = 5  # of the figure


@dataclass(frozen=True)
class Judged:
    """What is known of one subject.

    Attributes:
        subject: its name.
        chosen: step.
        halves: kept step -> image tower -> values on each half of the images.
        floor: image tower -> values of the base model with the class word.
        ceiling: image tower -> fidelity of the reference, encoded and decoded.
        training_s: seconds of all steps, without scoring.
        scoring_share: seconds of the scoring as a share of them.
    """

    subject: str
    chosen: int
    halves: Mapping[int, Mapping[str, Sequence[Values]]]
    floor: Mapping[str, Values]
    ceiling: Mapping[str, float]
    training_s: float
    scoring_share: float

    def value(self, step: int, tower: str, name: str, half: int | None = None) -> float:
        """Return a value of a kept step, on one half of the images or on all."""
        both = [values[name] for values in self.halves[step][tower]]
        return fmean(both) if half is None else both[half]

    def best(self, tower: str, half: int | None = None) -> int:
        """Return the kept step with the highest fidelity within the bounds of the choice; of all, if none is within."""
        bounds = Bounds.of(ScoringParams(), self.floor[tower].get("agreement"))

        def is_within(step: int) -> bool:
            values = {name: self.value(step, tower, name, half) for name in self.halves[step][tower][0]}
            return not bounds.passed(Score(step, loss_reference=0.0, **{"agreement": None, **values}))

        steps = [step for step in self.halves if is_within(step)] or list(self.halves)
        return max(steps, key=lambda step: self.value(step, tower, "fidelity", half))

    def regret(self, tower: str) -> float:
        """Return what the chosen step lacks in fidelity to the best, as a share of the range from floor to ceiling.

        The best step of each half is compared on the other half: the highest of several noisy values is too high.
        """
        lost = [
            self.value(self.best(tower, half), tower, "fidelity", 1 - half)
            - self.value(self.chosen, tower, "fidelity", 1 - half)
            for half in range(2)
        ]
        return fmean(lost) / (self.ceiling[tower] - self.floor[tower]["fidelity"])


@dataclass(frozen=True)
class Outcome:
    """A comparison over subjects, with its 95 % interval.

    Attributes:
        title: what is compared.
        tower: that measures.
        estimate: mean over subjects, and its interval.
        by_subject: subject -> value.
    """

    title: str
    tower: str
    estimate: Estimate
    by_subject: dict[str, float]


# ------------------------------------------------------------------------------------------- estimates


def compare(judged: Sequence[Judged], fixed_step: int | None) -> list[Outcome]:
    """Return chosen - last, chosen - a fixed step and the regret, each by both image towers.

    Args:
        judged: the subjects.
        fixed_step: None: the middle one of the kept steps.
    """
    common = sorted(set.intersection(*(set(one.halves) for one in judged)))
    fixed = common[len(common) // 2] if fixed_step is None else fixed_step
    found = []
    for tower in (TOWERS, OTHER):
        for name in _MEASURES:
            if name in judged[0].halves[common[0]][tower][0]:  # agreement may not be measured
                found.append(_outcome(f"{name}, chosen - last", tower, judged, _difference(tower, name, max)))
        best_fixed = max(common, key=lambda step: fmean(one.value(step, tower, "fidelity") for one in judged))
        for label, step in ((f"step {fixed}", fixed), (f"step {best_fixed}, the best one for all", best_fixed)):
            of_step = _difference(tower, "fidelity", lambda steps, step=step: step)
            found.append(_outcome(f"fidelity, chosen - {label}", tower, judged, of_step))
        found.append(_outcome("regret, share of the range", tower, judged, lambda one, tower=tower: one.regret(tower)))
    return found


def _difference(tower: str, name: str, other: Callable[[Sequence[int]], int]) -> Callable[[Judged], float]:
    """Return what takes the value of another step from that of the chosen one."""
    return lambda one: one.value(one.chosen, tower, name) - one.value(other(list(one.halves)), tower, name)


def _outcome(title: str, tower: str, judged: Sequence[Judged], value: Callable[[Judged], float]) -> Outcome:
    by_subject = {one.subject: value(one) for one in judged}
    return Outcome(title, tower, bootstrap_mean(list(by_subject.values())), by_subject)


# ------------------------------------------------------------------------------------------- table, figure


def to_markdown(judged: Sequence[Judged], outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> str:
    """Return the outcomes with their intervals, then the subjects."""
    lines = [
        "; ".join(f"{name}: {value}" for name, value in facts.items()),
        "",
        f"Means over {len(judged)} subjects, with 95 % intervals of a bootstrap over subjects.",
        "",
        "| | measured by | mean | 95 % interval |",
        "|---|---|---:|---:|",
    ]
    for one in outcomes:
        mean, low, high = one.estimate.mean, one.estimate.low, one.estimate.high
        lines.append(f"| {one.title} | {one.tower} | {mean:+.4f} | {low:+.4f} to {high:+.4f} |")
    lines += [
        "",
        f"| subject | chosen | last | best by {TOWERS} | best by {OTHER} | regret by {OTHER} | steps, s | scoring |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in judged:
        steps = f"{one.chosen} | {max(one.halves)} | {one.best(TOWERS)} | {one.best(OTHER)}"
        costs = f"{one.training_s:.0f} | {one.scoring_share:.1%}"
        lines.append(f"| {one.subject} | {steps} | {one.regret(OTHER):+.1%} | {costs} |")
    return "\n".join(lines)


def figure(judged: Sequence[Judged]) -> Any:
    """Plot the judged fidelity of every kept step, a panel per subject, with chosen and best step."""
    from plotly.subplots import make_subplots

    columns = min(_COLUMNS, len(judged))
    rows = math.ceil(len(judged) / columns)
    titles = [one.subject for one in judged]
    drawn = make_subplots(rows=rows, cols=columns, subplot_titles=titles, horizontal_spacing=0.05)
    for index, one in enumerate(judged):
        place = {"row": 1 + index // columns, "col": 1 + index % columns}
        for tower, color in _COLORS.items():
            steps = list(one.halves)
            fidelity = [one.value(step, tower, "fidelity") for step in steps]
            look = {"line": {"color": color}, "name": tower, "legendgroup": tower, "showlegend": index == 0}
            drawn.add_scatter(x=steps, y=fidelity, mode="lines+markers", **look, **place)
            best = one.best(tower)
            ring = {"size": 15, "symbol": "circle-open", "color": color, "line": {"width": 2}}
            drawn.add_scatter(x=[best], y=[one.value(best, tower, "fidelity")], marker=ring, showlegend=False, **place)
        line = {"color": _CHOSEN, "dash": "dash"}
        drawn.add_vline(one.chosen, line=line, **place)
    drawn.update_layout(
        template="plotly_white",
        title="Judged fidelity of the kept steps; dashed: the chosen step, rings: the best ones within the bounds",
        height=120 + 280 * rows,
        width=1400,
    )
    drawn.update_xaxes(title_text="step", row=rows)
    return drawn
