"""Draw the prompts of the regularization set."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PromptsParams
from dreamartist_pipeline.prompt_weights import parse_weights

if TYPE_CHECKING:
    from pandas import DataFrame, Series
else:  # Kedro evaluates a node's annotations when it registers the pipelines; importing pandas is slow
    DataFrame = Series = Any

log = logging.getLogger(__name__)


def check_prompts(params: PromptsParams, planned: PlannedConcept | None) -> None:
    """Check that there are prompts if the run's training needs a regularization set.

    Raises:
        InputError: no prompts.
    """
    if planned is not None and planned.needs_regularization and not params.num_prompts:
        raise InputError(
            expected="prompts.num_prompts above 0, or training.regularization_batch_size=0",
            got=f"prompts.num_prompts={params.num_prompts}",
            remedy="raise the one, or train without a regularization set",
        )


@checked_early("prompts", check_prompts)
def draw_regularization_prompts(prompt_database: DataFrame, params: PromptsParams) -> list[str]:
    """Draw distinct prompts at random without replacement, reproducibly by seed.

    Raises:
        InputError: no such column, a value that is not text, or fewer distinct prompts than requested.
    """
    column = _select_column(prompt_database, params.column)
    prompts = distinct_prompts(column)
    if len(prompts) < params.num_prompts:
        raise InputError(
            expected=f"at least prompts.num_prompts={params.num_prompts:,} distinct prompts in column {column.name!r}",
            got=f"{len(prompts):,} (in {len(column):,} rows, without blanks, duplicates and invalid braces)",
            remedy="lower it, or use a larger prompt database",
        )
    return random.Random(params.seed).sample(prompts, params.num_prompts)


def distinct_prompts(column: Series) -> list[str]:
    """Strip the prompts, drop missing, blank and repeated ones, keep the order of first appearance.

    Prompts whose braces are not valid weighted words, as in "a cat :}", are dropped too.

    Raises:
        InputError: a value that is not text.
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
    valid = [prompt for prompt in distinct if _has_valid_weights(prompt)]
    if len(valid) < len(distinct):
        log.info("Left out %d prompts with invalid braces.", len(distinct) - len(valid))
    return valid


def _has_valid_weights(prompt: str) -> bool:
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
        expected=f"prompts.column as an index below {len(names)} or one of {names}",
        got=f"{column!r}",
        remedy="name a column of the prompt database",
    )
