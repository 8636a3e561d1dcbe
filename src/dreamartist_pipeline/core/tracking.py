"""The interface for metrics and images that nodes log during a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

_Result = TypeVar("_Result")


class Tracker(Protocol):
    """Logs metrics and images of a run."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log scalar values."""

    def log_image(self, image: Image, key: str, step: int) -> None:
        """Log an image of a series."""

    def log_image_file(self, image: Image, file: str) -> None:
        """Log an image under a path, in place of an earlier one."""

    def set_tag(self, name: str, text: str) -> None:
        """Tag the run with a text."""

    def run_id(self) -> str | None:
        """Return the id of the run; None outside one."""


class NoTracker:
    """Logs nothing: for calls outside a run."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Ignore numbers."""

    def log_image(self, image: Image, key: str, step: int) -> None:
        """Ignore a picture."""

    def log_image_file(self, image: Image, file: str) -> None:
        """Ignore a picture in a file."""

    def set_tag(self, name: str, text: str) -> None:
        """Ignore a text."""

    def run_id(self) -> str | None:
        """Return None."""
        return None


def tracked(function: Callable[..., _Result], tracker: Tracker) -> Callable[..., _Result]:
    """Bind the argument `tracker` of a node function.

    The result has the signature of the others: Kedro sorts named inputs by it, and reads their types.
    """

    @functools.wraps(function)  # Kedro reads its type hints, Kedro-Viz its source
    def with_tracker(*args: Any, **kwargs: Any) -> _Result:
        return function(*args, tracker=tracker, **kwargs)

    signature = inspect.signature(function)
    others = [parameter for parameter in signature.parameters.values() if parameter.name != "tracker"]
    with_tracker.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    return with_tracker
