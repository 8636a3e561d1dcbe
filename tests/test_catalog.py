"""Datasets of Kedro's libraries write whole files through the project's catalog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from kedro.io import DataCatalog, DatasetError

from dreamartist_pipeline.catalog import ProjectCatalog
from dreamartist_pipeline.settings import DATA_CATALOG_CLASS


def catalog_of(folder: Path, **datasets: str) -> ProjectCatalog:
    """Return a catalog of datasets by name: type, with files of that name."""
    return ProjectCatalog.from_config(
        {name: {"type": kind, "filepath": str(folder / "new" / name)} for name, kind in datasets.items()}
    )


def figure() -> Any:
    import plotly.graph_objects as go

    return go.Figure(go.Scatter(y=[1, 2]))


def test_the_project_uses_this_catalog() -> None:
    assert DATA_CATALOG_CLASS is ProjectCatalog


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("json.JSONDataset", lambda: {"a": [1, "ä"]}),
        ("pandas.CSVDataset", lambda: pd.DataFrame({"a": [1, 2]})),
        ("plotly.HTMLDataset", figure),
        ("plotly.JSONDataset", figure),
    ],
)
def test_a_saved_file_is_that_of_the_plain_dataset(
    tmp_path: Path, kind: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uuid.uuid4", lambda: "0")  # in plotly's pages
    catalog = catalog_of(tmp_path, a=kind)
    for _ in range(2):
        catalog.save("a", make())
    plain = DataCatalog.from_config({"a": {"type": kind, "filepath": str(tmp_path / "plain" / "a")}})
    plain.save("a", make())
    assert (tmp_path / "new" / "a").read_bytes() == (tmp_path / "plain" / "a").read_bytes()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a"]


def test_an_error_leaves_the_earlier_file(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, a="json.JSONDataset")
    catalog.save("a", {"old": 1})
    before = (tmp_path / "new" / "a").read_bytes()
    with pytest.raises(DatasetError):
        catalog.save("a", {"new": "x" * 100_000, "not JSON": object()})
    assert (tmp_path / "new" / "a").read_bytes() == before
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a"]


def test_a_save_while_another_error_is_handled_counts(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, a="json.JSONDataset")
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        catalog.save("a", {"new": 1})
    assert catalog.load("a") == {"new": 1}
