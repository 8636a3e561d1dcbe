"""Where curves and pictures go while a node works; a run hands it to its nodes, and tests hand in their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

_Result = TypeVar("_Result")


class Tracker(Protocol):
    """What nodes need of the run's tracker."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers."""

    def log_image(self, image: Image, key: str, step: int) -> None:
        """Log a picture."""


def tracked(function: Callable[..., _Result], tracker: Tracker, **services: Any) -> Callable[..., _Result]:
    """Return the function with its keyword argument `tracker` given, and other services by their argument's name.

    A service is not data, so no dataset of the graph stands for it.
    """

    @functools.wraps(function)  # Kedro reads the hints of its parameters, kedro-viz its source
    def with_tracker(*args: Any, **kwargs: Any) -> _Result:
        return function(*args, tracker=tracker, **services, **kwargs)

    return with_tracker
