"""The page of all subjects: a table of the main measures, and the contact sheets. Jinja escapes all texts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL.Image import Image

from dreamartist_pipeline.core import measures
from dreamartist_pipeline.core.measures import Measure, metric_key
from dreamartist_pipeline.starting_runs import RunResult

_TEMPLATE = "subjects.html.jinja"
_SHOWN = (
    *(measures.SIMILARITY, measures.RECOGNITION, measures.CLIP_SCORE, measures.BACKGROUND),
    *(measures.CROP_DISTANCE, measures.PRIOR_DRIFT),
)
_WIDTH_PX = 640
_QUALITY = 85  # of JPEG


@dataclass(frozen=True)
class _Subject:
    """A finished run on the page; values has one text per column."""

    name: str
    values: tuple[str, ...]
    sheet: str


def render(results: Sequence[RunResult]) -> str:
    """Return the page as HTML that needs no other file; it links to the reports beside it."""
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
        columns=[one.title for one in columns],
        subjects=[_subject(one, list(columns.values())) for one in finished],
        failed=[one.outcome for one in results if one.outcome.message is not None],
    )
    return page


def _metric_of(measure: Measure, results: Sequence[RunResult]) -> str | None:
    """Return the metric of a measure of concepts, by the first model that has it in any run."""
    beginning = metric_key(measure, "" if measure is measures.PRIOR_DRIFT else "concept")  # drift is of concepts only
    names = dict.fromkeys(name for one in results for name in one.metrics)
    ways = (f"{beginning}.", f"{beginning}/")
    return next((name for name in names if name == beginning or name.startswith(ways)), None)


def _subject(result: RunResult, metrics: Sequence[str]) -> _Subject:
    values = (result.metrics.get(name) for name in metrics)
    texts = tuple("–" if value is None else f"{value:.3f}" for value in values)
    return _Subject(result.outcome.subject, texts, "" if result.picture is None else _embedded(result.picture()))


def _embedded(image: Image) -> str:
    """Return a picture, at most 640 px wide, as a data URI."""
    reduced: Any = image.copy()
    reduced.thumbnail((_WIDTH_PX, 10 * _WIDTH_PX))
    data = io.BytesIO()
    reduced.save(data, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
