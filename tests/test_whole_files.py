"""A file is replaced by a whole one, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamartist_pipeline.whole_files import written_whole


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "a.txt"
    with written_whole(file) as temporary:
        temporary.write_text("old")
    with written_whole(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
        assert (temporary.parent, temporary.suffix) == (file.parent, file.suffix)
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(file) as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
