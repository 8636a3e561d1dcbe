"""The prompt database on disk."""

import importlib.util
import inspect
from pathlib import Path

import pandas as pd
import pytest
import yaml
from kedro.io import DatasetError

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.datasets.prompts import PromptDatabaseDataset
from refusals import says

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "data" / "01_raw" / "prompts" / "embedded_world.parquet"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.parquet"
    pd.DataFrame({"prompt": [f"prompt {i}" for i in range(20)], "id": range(20)}).to_parquet(file)
    return file


def test_a_database_is_read_whole(database: Path) -> None:
    table = PromptDatabaseDataset(filepath=str(database)).load()

    assert list(table.columns) == ["prompt", "id"]
    assert len(table) == 20


def test_a_preview_shows_the_first_rows(database: Path) -> None:
    preview = PromptDatabaseDataset(filepath=str(database)).preview(nrows=2)

    assert preview == {"index": [0, 1], "columns": ["prompt", "id"], "data": [["prompt 0", 0], ["prompt 1", 1]]}
    assert inspect.signature(PromptDatabaseDataset.preview).return_annotation.__name__ == "TablePreview"


def test_a_missing_database_is_refused_with_its_path(tmp_path: Path) -> None:
    dataset = PromptDatabaseDataset(filepath=str(tmp_path / "none.parquet"))

    assert not dataset.exists()
    with pytest.raises(FileError, check=says(expected="none.parquet", got="no such file", remedy="prompt_database")):
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


def test_the_bundled_database_is_what_its_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_embedded_world", BUNDLED.with_name("make_embedded_world.py"))
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    made = script.make_table(*script.vocabulary())

    pd.testing.assert_frame_equal(PromptDatabaseDataset(filepath=str(BUNDLED)).load(), made)


def test_the_bundled_database_names_no_held_out_object() -> None:
    recipe = yaml.safe_load((ROOT / "conf" / "base" / "parameters_pretrain.yml").read_text(encoding="utf-8"))[
        "_recipes"
    ]["world"]
    prompts = PromptDatabaseDataset(filepath=str(BUNDLED)).load()["prompt"]

    assert prompts.is_unique
    assert not prompts.str.contains("|".join(recipe["held_out_objects"])).any()
