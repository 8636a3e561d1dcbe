"""Draw the prompts of the regularization set."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator
from itertools import compress, islice
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PromptsParams
from dreamartist_pipeline.prompt_weights import parse_weights

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile
else:  # Kedro evaluates a node's annotations when it registers the pipelines; importing pyarrow is slow
    ParquetFile = Any

log = logging.getLogger(__name__)


def check_prompts(params: PromptsParams, planned: PlannedConcept | None, prompt_database: ParquetFile) -> None:
    """Check that there are prompts if the run's training needs a regularization set, and enough in the database.

    The column is read up to the last prompt that is needed.

    Raises:
        InputError: no prompts, no such column, one that does not hold prompts, or fewer distinct ones than requested.
    """
    from dreamartist_pipeline.pipelines.prompts.reading import check_are_prompts, read_texts, select_column

    if planned is not None and planned.needs_regularization and not params.num_prompts:
        raise InputError(
            expected="prompts.num_prompts above 0, or training.regularization_batch_size=0",
            got=f"prompts.num_prompts={params.num_prompts}",
            remedy="raise the one, or train without a regularization set",
        )
    if not params.num_prompts:
        return
    schema = prompt_database.schema_arrow
    position = select_column(schema, params.column)
    check_are_prompts(read_texts(prompt_database, position), schema, position)
    valid = filter(_has_valid_weights, distinct_prompts(read_texts(prompt_database, position)))
    num_valid = sum(1 for _ in islice(valid, params.num_prompts))
    if num_valid < params.num_prompts:
        raise InputError(
            expected=f"at least prompts.num_prompts={params.num_prompts:,} distinct prompts in column "
            f"{schema.names[position]!r}",
            got=f"{num_valid:,} (in {prompt_database.metadata.num_rows:,} rows, without blanks, duplicates, invalid "
            "braces)",
            remedy="lower it, or use a larger prompt database",
        )


@checked_early("prompts", check_prompts, "prompt_database")
def draw_regularization_prompts(prompt_database: ParquetFile, params: PromptsParams) -> list[str]:
    """Draw distinct prompts at random without replacement, reproducibly by seed.

    The column is read twice, in batches: the prompts are counted, then those that were drawn are kept. Memory holds a
    hash of 16 bytes of every distinct prompt.

    Raises:
        InputError: a part of the column that cannot be read.
    """
    from dreamartist_pipeline.pipelines.prompts.reading import read_texts, select_column

    if not params.num_prompts:
        return []
    position = select_column(prompt_database.schema_arrow, params.column)
    is_valid = bytearray(map(_has_valid_weights, distinct_prompts(read_texts(prompt_database, position))))
    num_valid = sum(is_valid)
    log.info("Drawing from the %d prompts in column %r.", num_valid, prompt_database.schema_arrow.names[position])
    if num_valid < len(is_valid):
        log.info("Left out %d prompts with invalid braces.", len(is_valid) - num_valid)
    drawn = random.Random(params.seed).sample(range(num_valid), params.num_prompts)
    valid = compress(distinct_prompts(read_texts(prompt_database, position)), is_valid)
    chosen = set(drawn)
    prompts = {index: prompt for index, prompt in enumerate(islice(valid, max(drawn) + 1)) if index in chosen}
    return [prompts[index] for index in drawn]


def distinct_prompts(texts: Iterable[str]) -> Iterator[str]:
    """Strip texts, leave out blank and repeated ones, and keep the order of first appearance."""
    seen: set[bytes] = set()  # hashes, because prompts are ten times as long
    for text in texts:
        prompt = text.strip()
        key = hashlib.blake2b(prompt.encode(), digest_size=16).digest()
        if prompt and key not in seen:
            seen.add(key)
            yield prompt


def _has_valid_weights(prompt: str) -> bool:
    try:
        parse_weights(prompt)
    except ValueError:
        return False
    return True
