"""Check an error by its parts, so that tests name options and values and leave the wording free."""

from __future__ import annotations

from collections.abc import Callable

from dreamartist_pipeline.errors import InputError, TrainingError


def says(
    *, where: str = "", expected: str = "", got: str = "", remedy: str = ""
) -> Callable[[InputError | TrainingError], bool]:
    """Return a check for `pytest.raises`: every part of the error holds what is given for it.

        with pytest.raises(InputError, check=says(expected="training.lr", got="-1")): ...

    An error in one part fails the check even if another part holds the text.
    """

    def check(error: InputError | TrainingError) -> bool:
        return where in error.where and expected in error.expected and got in error.got and remedy in error.remedy

    return check
