"""The page of all subjects: a table of the main measures, and the contact sheets. Jinja escapes all texts."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from dreamartist_pipeline.core import measures
from dreamartist_pipeline.core.measures import Measure, metric_key
from dreamartist_pipeline.interop.drawn_pictures import as_webp
from dreamartist_pipeline.starting_runs import RunResult

_TEMPLATE = "subjects.html.jinja"
_SHOWN = (
    *(measures.SIMILARITY, measures.RECOGNITION, measures.CLIP_SCORE, measures.BACKGROUND),
    *(measures.CROP_DISTANCE, measures.PRIOR_DRIFT),
)
_SIDES = ((50, 1200), (500, 480))
"""(most subjects, longer side of their contact sheets in pixels): a page of some 10 MB at most."""


@dataclass(frozen=True)
class _Subject:
    """A finished run on the page: one text per column, and the address of its contact sheet."""

    name: str
    values: tuple[str, ...]
    sheet: str


def render(results: Sequence[RunResult]) -> str:
    """Return the page as HTML, with links to the reports beside it.

    It needs no other file, except that more than 500 contact sheets are links, too.
    """
    finished = [one for one in results if one.outcome.message is None]
    columns = {one: key for one in _SHOWN if (key := _metric_of(one, finished)) is not None}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: str = environment.get_template(_TEMPLATE).render(
        columns=list(columns),
        subjects=[_subject(one, list(columns.values()), _side_px(len(finished))) for one in finished],
        failed=[one.outcome for one in results if one.outcome.message is not None],
    )
    return page


def _metric_of(measure: Measure, results: Sequence[RunResult]) -> str | None:
    """Return the metric of a measure of concepts, by the first model that has it in any run."""
    beginning = metric_key(measure, "" if measure is measures.PRIOR_DRIFT else "concept")  # drift is of concepts only
    names = dict.fromkeys(name for one in results for name in one.metrics)
    ways = (f"{beginning}.", f"{beginning}/")
    return next((name for name in names if name == beginning or name.startswith(ways)), None)


def _subject(result: RunResult, metrics: Sequence[str], side_px: int | None) -> _Subject:
    values = (result.metrics.get(name) for name in metrics)
    texts = tuple("–" if value is None else f"{value:.3f}" for value in values)
    name = result.outcome.subject
    if side_px is None or result.picture is None:
        return _Subject(name, texts, f"../{name}/contact_sheet.png")
    return _Subject(name, texts, f"data:image/webp;base64,{b64encode(as_webp(result.picture(), side_px)).decode()}")


def _side_px(num_subjects: int) -> int | None:
    """Return the longer side of embedded contact sheets; None where the page would be too large for them."""
    return next((side_px for most, side_px in _SIDES if num_subjects <= most), None)
