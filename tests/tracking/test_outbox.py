"""What a tracking store has not taken, on the disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dreamartist_pipeline.tracking import outbox
from dreamartist_pipeline.tracking.outbox import Outbox, Record, described

ABOUT = {"store": "http://host", "lock": None}


def metric(step: int, value: float = 0.5) -> Record:
    metrics = [{"key": "loss", "value": value, "timestamp": 7, "step": step}]
    return Record("batch", {"metrics": metrics, "parameters": {}, "tags": {}})


@pytest.fixture
def kept(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox" / "0123")


def test_nothing_is_written_before_the_first_record(kept: Outbox) -> None:
    assert list(kept) == []
    assert not kept.folder.parent.exists()


def test_records_come_back_in_their_order_with_copies_of_their_files(kept: Outbox, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    for content in (b"first", b"second"):
        picture.write_bytes(content)
        kept.append(Record("file", {"file": str(picture), "path": "images"}), ABOUT)
    kept.append(metric(3, math.nan), ABOUT)
    first, second, number = list(kept)
    assert [Path(each.content["file"]).read_bytes() for each in (first, second)] == [b"first", b"second"]
    assert math.isnan(number.content["metrics"][0]["value"])
    assert kept.about() == ABOUT
    assert kept.counts() == {"files": 2, "metrics": 1}


def test_every_line_is_json(kept: Outbox) -> None:
    kept.append(metric(1), ABOUT)
    (line,) = (kept.folder / "records.jsonl").read_text().splitlines()
    assert json.loads(line)["metrics"][0]["step"] == 1


def test_a_line_that_a_kill_has_cut_is_left_out(kept: Outbox) -> None:
    kept.append(metric(1), ABOUT)
    with (kept.folder / "records.jsonl").open("a") as records:
        records.write('{"kind": "batch", "met')
    assert list(kept) == [metric(1)]


def test_what_is_delivered_is_removed_with_its_files(kept: Outbox, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
        kept.append(Record("file", {"file": str(tmp_path / name), "path": ""}), ABOUT)
    _, second = list(kept)
    kept.replace([second])
    assert list(kept) == [second]
    assert [file.name for file in (kept.folder / "files").glob("*/*")] == ["b.txt"]
    kept.replace([])
    assert not kept.folder.exists()


def test_all_outboxes_together_are_bounded(kept: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_BYTES", 2000)
    other = Outbox(kept.folder.with_name("4567"))
    for step in range(11):
        other.append(metric(step), ABOUT)
    with pytest.raises(OSError, match="GiB"):
        for step in range(30):
            kept.append(metric(step), ABOUT)
    assert 1 < len(list(kept)) < 8


def test_a_full_disk_leaves_no_part_of_a_line(kept: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.append(metric(1), ABOUT)
    size = (kept.folder / "records.jsonl").stat().st_size
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with pytest.raises(OSError):
            kept.append(metric(2), ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    kept.append(metric(3), ABOUT)
    assert list(kept) == [metric(1), metric(3)]


def test_counts_are_described_in_words() -> None:
    assert described({"metrics": 12, "files": 1, "status": 1}) == "12 metrics, 1 file, the status"
    assert described({}) == "nothing"


def test_a_model_is_kept_with_a_copy_of_its_folder(kept: Outbox, tmp_path: Path) -> None:
    (tmp_path / "last" / "artifacts").mkdir(parents=True)
    (tmp_path / "last" / "artifacts" / "a.txt").write_text("a")
    kept.append(Record("model", {"folder": str(tmp_path / "last"), "name": "fox"}), ABOUT)
    kept.append(metric(1), ABOUT)
    (tmp_path / "last" / "artifacts" / "a.txt").write_text("of a later run")
    model, _ = list(kept)
    assert (Path(model.content["folder"]) / "artifacts" / "a.txt").read_text() == "a"
    assert kept.counts() == {"models": 1, "metrics": 1}
    kept.replace([model])
    assert list(kept) == [model]
    assert (Path(model.content["folder"]) / "artifacts" / "a.txt").read_text() == "a"
