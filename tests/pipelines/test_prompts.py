"""Drawing regularization prompts from a prompt database."""

from typing import get_type_hints

import pandas as pd
import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PromptsParams
from dreamartist_pipeline.pipelines.prompts import create_pipeline
from dreamartist_pipeline.pipelines.prompts.nodes import distinct_prompts, draw_regularization_prompts
from refusals import says

DATABASE = pd.DataFrame({"id": range(100), "prompt": [f"prompt {i}" for i in range(100)]})


def draw(database: pd.DataFrame = DATABASE, **params: object) -> list[str]:
    return draw_regularization_prompts(database, PromptsParams.model_validate({"column": "prompt", **params}))


def test_prompts_are_stripped_and_blanks_and_repetitions_dropped() -> None:
    column = pd.Series([" a cat", "a cat ", "", "  ", None, "a dog", "a cat"])

    assert distinct_prompts(column) == ["a cat", "a dog"]


def test_prompts_with_unreadable_braces_are_dropped_and_weighted_words_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    column = pd.Series(["a cat :}", "{{best} quality:1.2}, cat", "a {cat", "{a:b}", "(cat:1.2)"])

    assert distinct_prompts(column) == ["{{best} quality:1.2}, cat", "(cat:1.2)"]
    assert [record.args for record in caplog.records] == [(3,)]


def test_the_same_seed_draws_the_same_prompts() -> None:
    assert draw(num_prompts=10, seed=3) == draw(num_prompts=10, seed=3)


def test_another_seed_draws_others() -> None:
    assert draw(num_prompts=10, seed=3) != draw(num_prompts=10, seed=4)


def test_the_draw_is_without_replacement_and_not_in_file_order() -> None:
    drawn = draw(num_prompts=100)

    assert sorted(drawn) == sorted(DATABASE["prompt"])
    assert drawn != list(DATABASE["prompt"])


def test_a_column_is_chosen_by_name_or_number() -> None:
    assert draw(num_prompts=5, column=1) == draw(num_prompts=5, column="prompt")


def test_no_prompts_may_be_requested() -> None:
    assert draw(num_prompts=0) == []


def test_too_few_prompts_are_refused_with_their_number() -> None:
    database = pd.DataFrame({"prompt": ["a", "a ", "b", " "]})

    with pytest.raises(InputError, check=says(expected="prompts.num_prompts=3", got="2 (in 4 rows")):
        draw(database, num_prompts=3)


def test_an_empty_database_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="prompts.num_prompts=1", got="0 (in 0 rows")):
        draw(DATABASE.head(0), num_prompts=1)


@pytest.mark.parametrize("column", ["caption", 2, -1])
def test_a_missing_column_lists_the_columns(column: str | int) -> None:
    with pytest.raises(InputError, check=says(expected="['id', 'prompt']", got=repr(column))):
        draw(num_prompts=1, column=column)


def test_a_database_without_columns_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="prompts.column", got="0")):
        draw(pd.DataFrame(), num_prompts=1, column=0)


def test_a_column_of_numbers_is_refused_with_a_value() -> None:
    with pytest.raises(InputError, check=says(expected="'id'", got="0 (int)", remedy="prompts.column")):
        draw(num_prompts=1, column="id")


def test_kedro_can_resolve_the_hints_of_the_node_and_validate_its_parameters() -> None:
    assert get_type_hints(draw_regularization_prompts)["params"] is PromptsParams


def test_the_stage_goes_from_the_database_to_the_prompts() -> None:
    stage = create_pipeline()

    assert stage.inputs() == {"prompt_database", "params:prompts"}
    assert stage.outputs() == {"regularization_prompts"}
