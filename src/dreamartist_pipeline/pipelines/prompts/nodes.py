"""Draw the prompts of the regularization set."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PromptsParams
from dreamartist_pipeline.prompt_weights import parse_weights

if TYPE_CHECKING:
    from pandas import DataFrame, Series
else:  # Kedro resolves the hints of a node when it registers the pipelines, without importing pandas
    DataFrame = Series = Any

log = logging.getLogger(__name__)


def draw_regularization_prompts(prompt_database: DataFrame, params: PromptsParams) -> list[str]:
    """Draw distinct prompts at random, without replacement; the same seed draws the same ones in the same order.

    Raises:
        InputError: no such column, a column without text, or fewer distinct prompts than asked for.
    """
    column = _select_column(prompt_database, params.column)
    prompts = distinct_prompts(column)
    if len(prompts) < params.num_prompts:
        raise InputError(
            expected=(
                f"at least {params.num_prompts:,} different prompts in column {column.name!r} of the prompt database"
            ),
            got=f"{len(prompts):,} (from {len(column):,} rows, without blanks, duplicates and unreadable braces)",
            remedy="lower prompts.num_prompts or give a larger prompt database",
        )
    return random.Random(params.seed).sample(prompts, params.num_prompts)


def distinct_prompts(column: Series) -> list[str]:
    """Strip the prompts, drop missing, blank and repeated ones, keep the order of first appearance.

    Prompts whose braces cannot be read as weighted words, as in "a cat :}", are dropped too: no one is there to correct
    them.

    Raises:
        InputError: something other than text is in the column.
    """
    values = column.dropna()
    for value in values:
        if not isinstance(value, str):
            raise InputError(
                expected=f"text in column {column.name!r} of the prompt database",
                got=f"{value!r} ({type(value).__name__})",
                remedy="set prompts.column to the column that holds the prompts",
            )
    stripped = (value.strip() for value in values)
    distinct = list(dict.fromkeys(prompt for prompt in stripped if prompt))
    readable = [prompt for prompt in distinct if _is_readable(prompt)]
    if len(readable) < len(distinct):
        log.info("Left out %d prompts whose braces are no weighted words.", len(distinct) - len(readable))
    return readable


def _is_readable(prompt: str) -> bool:
    try:
        parse_weights(prompt)
    except ValueError:
        return False
    return True


def _select_column(database: DataFrame, column: str | int) -> Series:
    names = [str(name) for name in database.columns]
    if isinstance(column, int) and 0 <= column < len(names):
        return database.iloc[:, column]
    if isinstance(column, str) and column in names:
        return database.iloc[:, names.index(column)]
    raise InputError(
        expected=(
            f"prompts.column to be one of {', '.join(map(repr, names)) or 'no columns at all'}"
            f"{f' (or 0 to {len(names) - 1})' if names else ''}"
        ),
        got=f"{column!r}",
        remedy="name a column that the prompt database has",
    )
