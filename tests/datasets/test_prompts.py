"""The prompt database on disk."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from kedro.io import DatasetError

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.datasets.prompts import PromptDatabaseDataset
from refusals import says

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "data" / "01_raw" / "prompts" / "embedded_world.parquet"
GENERAL = BUNDLED.with_name("general.parquet")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.parquet"
    pd.DataFrame({"prompt": [f"prompt {i}" for i in range(20)], "id": range(20)}).to_parquet(file)
    return file


def test_a_database_is_opened_without_reading_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "prompts.parquet"
    table = pa.table({"prompt": ["a cat"] * 20, "image": [{"bytes": b"1"}] * 20, "id": range(20)})
    pq.write_table(table, file, compression="none")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"a cat", b"\xff\xff\xff\xff\xff", 1))

    opened = PromptDatabaseDataset(filepath=str(file)).load()

    assert opened.schema_arrow.names == ["prompt", "image", "id"]
    assert pa.types.is_dictionary(opened.schema_arrow.field("prompt").type)  # a repeated text is held once
    assert opened.metadata.num_rows == 20


def test_a_preview_shows_the_first_rows(database: Path) -> None:
    preview = PromptDatabaseDataset(filepath=str(database)).preview(nrows=2)

    assert preview == {"index": [0, 1], "columns": ["prompt", "id"], "data": [["prompt 0", 0], ["prompt 1", 1]]}
    assert inspect.signature(PromptDatabaseDataset.preview).return_annotation.__name__ == "TablePreview"


def test_a_preview_shows_the_types_of_pictures_and_lists(tmp_path: Path) -> None:
    file = tmp_path / "prompts.parquet"
    pictures = {
        "image": [{"bytes": b"\x89PNG", "path": None}],
        "raw": [b"\x89PNG"],
        "tags": [["a"]],
        "prompt": ["a cat"],
    }
    pq.write_table(pa.table(pictures), file)

    ((image, raw, tags, prompt),) = PromptDatabaseDataset(filepath=str(file)).preview()["data"]

    assert (raw, prompt) == ("(binary)", "a cat")
    assert image.startswith("(struct")
    assert tags.startswith("(list")
    assert "PNG" not in image


def test_a_preview_of_a_damaged_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a cat"]}), file, compression="none")
    file.write_bytes(file.read_bytes().replace(b"a cat", b"\xff\xff\xff\xff\xff"))

    with pytest.raises(FileError, check=says(expected="prompts.parquet", got="utf-8")):
        PromptDatabaseDataset(filepath=str(file)).preview()


def test_a_missing_database_is_refused_with_its_path(tmp_path: Path) -> None:
    dataset = PromptDatabaseDataset(filepath=str(tmp_path / "none.parquet"))

    assert not dataset.exists()
    with pytest.raises(
        FileError, check=says(expected="none.parquet", got="no such file", remedy="--params prompt_database=FILE")
    ):
        dataset.load()


@pytest.mark.parametrize("content", [b"", b"prompt,id\na cat,1\n", b"PAR1 and then nothing PAR1"])
def test_a_file_that_is_not_parquet_is_refused_with_how_to_convert_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.parquet"
    file.write_bytes(content)

    with pytest.raises(FileError, check=says(expected="prompts.parquet", remedy="to_parquet")):
        PromptDatabaseDataset(filepath=str(file)).load()


def test_a_database_is_never_written(database: Path) -> None:
    with pytest.raises(DatasetError, match="read-only"):
        PromptDatabaseDataset(filepath=str(database)).save(pd.DataFrame())


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BUNDLED.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def general() -> list[str]:
    return list(pd.read_parquet(GENERAL)["prompt"])


def test_the_general_database_is_what_its_script_makes() -> None:
    script = load_script("make_general")

    made = script.make_table(yaml.safe_load(script.PARTS.read_text(encoding="utf-8")))

    pd.testing.assert_frame_equal(pd.read_parquet(GENERAL), made)


def test_the_general_database_has_distinct_prompts_that_fit_clips_context(general: list[str]) -> None:
    assert len(set(general)) == len(general) >= 2000
    # CLIP's vocabulary has a token for nearly every word here, and two are enough for each of the others
    assert max(2 * len(re.findall(r"\w+|[^\w\s]", prompt)) for prompt in general) <= 75


def test_the_general_database_has_plain_words_only(general: list[str]) -> None:
    assert [prompt for prompt in general if not re.fullmatch(r"[a-z0-9]+(?:(?:, |[ '-])[a-z0-9]+)*", prompt)] == []
    assert [prompt for prompt in general if re.search(r"\b(?:my|sks|pt\d)\b|[bcdfghjklmnpqrstvwxz]{6}", prompt)] == []
    assert [prompt for prompt in general if re.search(r"\ba (?!uni)[aeiou]|\ban [^aeiou]|\b(\w+) \1\b", prompt)] == []


def test_the_bundled_database_is_what_its_script_makes() -> None:
    script = load_script("make_embedded_world")

    made = script.make_table(*script.vocabulary())

    pd.testing.assert_frame_equal(pd.read_parquet(BUNDLED), made)


def test_the_bundled_database_names_no_held_out_object() -> None:
    recipe = yaml.safe_load((ROOT / "conf" / "base" / "parameters_pretrain.yml").read_text(encoding="utf-8"))[
        "_recipes"
    ]["world"]
    prompts = pd.read_parquet(BUNDLED)["prompt"]

    assert prompts.is_unique
    assert not prompts.str.contains(rf"\b(?:{'|'.join(recipe['held_out_objects'])})s?\b").any()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a picture"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"prompt\n" + b"a" * 1_000_000, "a text"),
        (b"prompt\n" + bytes(100), "unknown kind"),
        (b"PAR1" + bytes(100) + b"PAR1", "damaged parquet table"),
    ],
)
def test_a_file_of_another_kind_is_named_without_its_bytes(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "prompts.parquet").write_bytes(content)
    with pytest.raises(FileError, check=says(got=kind)) as caught:
        PromptDatabaseDataset(filepath=str(tmp_path / "prompts.parquet")).load()
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_a_preview_shows_the_beginning_of_a_long_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["x" * 10_000]}), tmp_path / "a.parquet")
    preview = PromptDatabaseDataset(filepath=str(tmp_path / "a.parquet")).preview()
    assert len(str(preview)) < 1000
