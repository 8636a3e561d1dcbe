"""Errors with a message in three parts."""

from __future__ import annotations

import pickle

from dreamartist_pipeline.errors import InputError, TrainingError
from refusals import says


def test_the_message_has_all_parts_in_order() -> None:
    assert str(InputError("a rank of at least 1", "0", "raise it")) == "expected a rank of at least 1; got 0; raise it"
    assert str(InputError("a", "b", "do c", where="export")) == "export: expected a; got b; do c"


def test_several_lines_keep_the_remedy_on_a_line_of_its_own() -> None:
    assert str(InputError("a", "others:\n  b", "do c")) == "expected a; got others:\n  b\ndo c"


def test_an_error_can_be_pickled() -> None:
    for kind in (InputError, TrainingError):
        error = pickle.loads(pickle.dumps(kind("a", "b", "do c", where="d")))
        assert (type(error), str(error), error.remedy) == (kind, "d: expected a; got b; do c", "do c")


def test_an_error_is_checked_by_its_parts() -> None:
    error = InputError("training.lr above 0", "-1", "raise it")
    assert says(expected="training.lr", got="-1")(error)
    assert not says(expected="-1")(error)  # elsewhere in the message
