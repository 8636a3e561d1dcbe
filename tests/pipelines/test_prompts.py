"""Drawing regularization prompts from a prompt database."""

import base64
import hashlib
import io
import random
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamartist_pipeline.datasets.prompts import PromptDatabaseDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PromptsParams
from dreamartist_pipeline.pipelines.prompts import create_pipeline
from dreamartist_pipeline.pipelines.prompts.nodes import check_prompts, distinct_prompts, draw_regularization_prompts
from refusals import says

PROMPTS = [f"prompt {i}" for i in range(100)]
DATABASE = pa.table({"id": range(100), "prompt": PROMPTS})
PNG = [b"\x89PNG\r\n\x1a\n" + hashlib.sha256(bytes([i])).digest() * 50 for i in range(100)]


def draw(database: pa.Table = DATABASE, **params: object) -> list[str]:
    file = io.BytesIO()
    pq.write_table(database, file)
    given = PromptsParams.model_validate({"num_prompts": 1, **params})
    check_prompts(given, None, pq.ParquetFile(file))
    return draw_regularization_prompts(pq.ParquetFile(file), given)


@contextmanager
def counted_memory() -> Iterator[pa.MemoryPool]:
    """Yield the pool of what Arrow allocates from here on."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(usual)


def test_prompts_are_stripped_and_blanks_and_repetitions_dropped() -> None:
    assert list(distinct_prompts([" a cat", "a cat ", "", "  ", "a dog", "a cat"])) == ["a cat", "a dog"]


def test_prompts_with_unreadable_braces_are_dropped_and_weighted_words_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    database = pa.table({"prompt": ["a cat :}", "{{best} quality:1.2}, cat", "a {cat", "{a:b}", "(cat:1.2)", None]})

    assert sorted(draw(database, num_prompts=2)) == ["(cat:1.2)", "{{best} quality:1.2}, cat"]
    assert (3,) in [record.args for record in caplog.records]


def test_the_draw_is_pythons_sample_of_the_distinct_prompts() -> None:
    repeated = pa.table({"prompt": PROMPTS * 2})

    assert draw(repeated, num_prompts=30, seed=5) == random.Random(5).sample(PROMPTS, 30)


def test_the_same_seed_draws_the_same_prompts() -> None:
    assert draw(num_prompts=10, seed=3) == draw(num_prompts=10, seed=3)


def test_another_seed_draws_others() -> None:
    assert draw(num_prompts=10, seed=3) != draw(num_prompts=10, seed=4)


def test_the_draw_is_without_replacement_and_not_in_file_order() -> None:
    drawn = draw(num_prompts=100)

    assert sorted(drawn) == sorted(PROMPTS)
    assert drawn != PROMPTS


def test_a_column_is_chosen_by_name_or_number() -> None:
    assert draw(num_prompts=5, column=1) == draw(num_prompts=5, column="prompt")


def test_no_prompts_may_be_requested() -> None:
    assert draw(num_prompts=0) == []


def test_too_few_prompts_are_refused_with_their_number() -> None:
    database = pa.table({"prompt": ["a", "a ", "b", " "]})

    with pytest.raises(InputError, check=says(expected="prompts.num_prompts=3", got="2 (in 4 rows")):
        draw(database, num_prompts=3)


def test_an_empty_database_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="prompts.num_prompts=1", got="0 (in 0 rows")):
        draw(DATABASE.slice(0, 0))


@pytest.mark.parametrize("column", ["caption", 2, -1])
def test_a_missing_column_lists_the_columns(column: str | int) -> None:
    with pytest.raises(InputError, check=says(expected="'id' (int64), 'prompt' (text)", got=repr(column))):
        draw(column=column)


def test_a_database_without_columns_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="prompts.column", got="0")):
        draw(pa.table({}), column=0)


@pytest.mark.parametrize("name", ["prompt", "text", "caption", "Prompt", "TEXT"])
def test_the_usual_column_is_found_by_its_name(name: str) -> None:
    assert draw(pa.table({"image_name": [f"{i}.png" for i in range(100)], name: PROMPTS}))[0] in PROMPTS


def test_the_usual_names_have_an_order_and_other_types_are_passed_over() -> None:
    others = ["another"] * 100
    database = pa.table({"caption": others, "prompt": [[p] for p in PROMPTS], "text": PROMPTS})

    assert draw(database)[0] in PROMPTS


def test_without_a_usual_name_the_first_column_is_taken() -> None:
    assert draw(pa.table({"description": PROMPTS, "style": ["oil"] * 100}))[0] in PROMPTS


def test_prompts_are_drawn_from_the_column_that_is_named_though_others_share_its_name() -> None:
    others = ["another"] * 100
    database = pa.Table.from_arrays([pa.array(others), pa.array(PROMPTS), pa.array(others)], names=["a", "a", "a.b"])

    assert draw(database, column=1)[0] in PROMPTS
    assert draw(database, column="a.b") == ["another"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([f"{uuid.uuid4()}.png" for _ in range(100)], "file names"),
        ([f"IMG {i}.JPG" for i in range(100)], "file names"),
        ([f"train/00/{i:06d}.feather" for i in range(100)], "file names"),
        ([hashlib.md5(bytes([i])).hexdigest() for i in range(100)], "hashes"),
        ([str(uuid.uuid4()) for _ in range(100)], "hashes"),
        ([base64.b64encode(hashlib.sha256(bytes([i])).digest()).decode() for i in range(100)], "hashes"),
        ([base64.b64encode(png).decode() for png in PNG], "hashes"),
        ([f"https://example.org/{i}?w=512" for i in range(100)], "addresses"),
        ([f"{i}" for i in range(100)], "numbers"),
        ([png.decode("latin-1") for png in PNG], "bytes"),
        ([repr(png) for png in PNG], "bytes"),
        (PNG, "binary"),
        ([{"bytes": png, "path": None} for png in PNG], "struct"),
        ([[prompt] for prompt in PROMPTS], "list"),
        (range(100), "int64"),
    ],
)
@pytest.mark.parametrize("column", ["prompt", 0, None])
def test_a_column_of_something_else_is_refused_with_the_columns(values: object, kind: str, column: object) -> None:
    database = pa.table({"prompt": values, "description": PROMPTS})

    refused = says(expected="'description' (text)", got="'prompt'", remedy="prompts.column")
    with pytest.raises(InputError, check=refused) as raised:
        draw(database, column=column)
    assert kind in raised.value.got
    assert len(str(raised.value)) < 300
    assert "PNG" not in str(raised.value)


def test_a_database_without_any_prompts_is_refused_with_the_option_for_another() -> None:
    with pytest.raises(InputError, check=says(got="hashes", remedy="prompt_database=FILE")) as raised:
        draw(pa.table({"id": range(100), "key": [hashlib.md5(bytes([i])).hexdigest() for i in range(100)]}), column=1)
    assert "prompts.column" not in raised.value.remedy


def test_a_few_file_names_among_prompts_do_no_harm() -> None:
    assert len(draw(pa.table({"prompt": [*PROMPTS, "1.png", "2.png"]}), num_prompts=102)) == 102


@pytest.mark.parametrize(
    "prompts", [["一只猫在草地上", "猫"], ["1girl, long_hair, solo", "looking_at_viewer"], ["cat", "3d render, v1.5"]]
)
def test_short_prompts_and_tags_are_prompts(prompts: list[str]) -> None:
    assert sorted(draw(pa.table({"prompt": prompts}), num_prompts=2)) == sorted(prompts)


def test_text_that_is_not_utf8_is_refused() -> None:
    broken = pa.array([b"a cat", b"a \xff dog"]).cast(pa.binary()).view(pa.string())

    with pytest.raises(InputError, check=says(expected="'prompt'", got="UTF-8")):
        draw(pa.table({"prompt": broken}))


def test_repeated_rows_and_other_columns_take_no_memory(tmp_path: Path) -> None:
    """12 million rows of 1,000 characters in a small file."""
    prompts = pa.DictionaryArray.from_arrays(
        pa.array([0, 1] * 6_000_000, pa.int8()), pa.array(["a cat " * 170, "a dog " * 170])
    )
    file = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": prompts, "image": prompts}), file, store_schema=False)
    del prompts

    with counted_memory() as memory:
        database = PromptDatabaseDataset(filepath=str(file)).load()
        drawn = draw_regularization_prompts(database, PromptsParams(num_prompts=2))

    assert len(drawn) == 2
    assert memory.max_memory() < 50e6


def test_kedro_can_resolve_the_hints_of_the_node_and_validate_its_parameters() -> None:
    assert get_type_hints(draw_regularization_prompts)["params"] is PromptsParams


def test_the_stage_goes_from_the_database_to_the_prompts() -> None:
    stage = create_pipeline()

    assert stage.inputs() == {"prompt_database", "params:prompts"}
    assert stage.outputs() == {"regularization_prompts"}


def test_texts_that_are_too_long_for_a_prompt_are_left_out() -> None:
    database = pa.table({"prompt": ["a cat", "x" * 10_001, "x" * 10_000]})

    assert sorted(map(len, draw(database, num_prompts=2))) == [5, 10_000]
    with pytest.raises(InputError, check=says(got="2 (in 3 rows")):
        draw(database, num_prompts=3)


def test_long_values_are_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """Half a gigabyte of text in a small file."""
    texts = pa.array(["y" * 9_000]).take(pa.array([0] * 1000))
    schema = pa.schema({"other": pa.struct({"a": pa.int64()}), "prompt": pa.string()})
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        batch = pa.table({"other": pa.array([{"a": 1}] * 1000), "prompt": texts}, schema)
        for _ in range(50):
            writer.write_table(batch)
    database = PromptDatabaseDataset(filepath=str(tmp_path / "a.parquet")).load()

    with counted_memory() as pool, pytest.raises(InputError, check=says(got="1 (in 50,000 rows")):
        check_prompts(PromptsParams(num_prompts=2), None, database)

    assert pool.max_memory() < 300_000_000
