"""A page in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from kedro.io import DatasetError

from dreamartist_pipeline.datasets.page import PageDataset


def test_a_page_is_loaded_and_previewed_as_it_was_saved(tmp_path: Path) -> None:
    dataset = PageDataset(filepath=str(tmp_path / "new" / "page.html"))
    dataset.save("<p>ä\nb</p>")
    assert dataset.load() == dataset.preview() == "<p>ä\nb</p>"
    assert (tmp_path / "new" / "page.html").read_bytes() == "<p>ä\nb</p>".encode()


def test_a_missing_page_is_refused_and_previewed_as_nothing(tmp_path: Path) -> None:
    dataset = PageDataset(filepath=str(tmp_path / "page.html"))
    assert not dataset.exists()
    assert dataset.preview() == ""
    with pytest.raises(DatasetError, match=r"page\.html"):
        dataset.load()
