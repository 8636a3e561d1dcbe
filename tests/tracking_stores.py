"""MLflow stores of tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def tracking_uri(uri: str) -> Iterator[None]:
    """Let MLflow track to `uri`.

    Afterwards no URI is set: MLflow passes the one that is set to later processes, in the environment.
    """
    import mlflow

    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
