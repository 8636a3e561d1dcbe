"""The values of all steps of a training."""

import sys

import torch

from dreamartist_pipeline.core.history import History

ROWS = [{"step": step, "loss": 0.1 * step, "lr/words": 1e-3} for step in range(1, 6)]


def _history() -> History:
    history = History()
    for row in ROWS:
        history.append(row)
    return history


def test_rows_are_those_that_were_added():
    history = _history()
    assert list(history) == ROWS
    assert (history[-1], history[-2:], history[:2]) == (ROWS[-1], ROWS[-2:], ROWS[:2])
    assert all(isinstance(row["step"], int) for row in history)


def test_without_rows_there_is_nothing():
    assert not History()
    assert list(History.of_saved(History().to_save())) == []


def test_steps_after_a_step_are_removed_and_can_be_added_again():
    history = _history()
    history.cut(3)
    assert list(history) == ROWS[:3]
    history.append(ROWS[3])
    assert list(history) == ROWS[:4]


def test_a_saved_history_is_the_same_again():
    saved = _history().to_save()
    assert saved["columns"] == ["step", "loss", "lr/words"]
    assert (saved["values"].shape, saved["values"].dtype) == ((5, 3), torch.float64)
    assert list(History.of_saved(saved)) == ROWS


def test_a_row_takes_eight_bytes_a_column():
    history = History()
    before = sys.getsizeof(history._values)
    for step in range(10_000):
        history.append({"step": step, "loss": 0.5, "lr/words": 1e-3})
    assert (sys.getsizeof(history._values) - before) / 10_000 < 1.2 * 3 * 8  # an array grows in advance
