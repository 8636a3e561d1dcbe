"""Whether a tracking store answers, found out within seconds before a run."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.redaction import redact, without_credentials
from dreamartist_pipeline.tracking.databases import PROBE_S, check_database, database_file
from dreamartist_pipeline.tracking.delivery import quiet, reason_of

_Result = TypeVar("_Result")
_SEARCH = "/api/2.0/mlflow/experiments/search"
_LOCAL = "unset MLFLOW_TRACKING_URI to record in data/09_tracking/mlflow.db instead"
_CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_DENIED = (401, 403)
_EXAMPLES = "a server (http://HOST:5000) or a database (sqlite:////FOLDER/mlflow.db, postgresql://…)"
REQUEST_LIMITS = {  # MLflow waits 120 s for an answer, and tries 7 times more
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""Environment variables of MLflow, and their values in this project unless they are set."""


def check_store(tracking_uri: str) -> None:
    """Check that a tracking store can be used.

    Raises:
        InputError: it cannot: it does not answer, wants credentials, is no MLflow, or is a database that is damaged,
            locked, or cannot be written.
    """
    scheme = tracking_uri.partition("://")[0] if "://" in tracking_uri else ""
    if (file := database_file(tracking_uri)) is not None:
        check_database(file)
    elif scheme in ("http", "https"):
        _check_server(tracking_uri)
    elif tracking_uri.partition(":")[0] != "databricks":
        _check_scheme(tracking_uri, scheme.partition("+")[0])
        _check_others(tracking_uri)


def _check_scheme(tracking_uri: str, scheme: str) -> None:
    """Refuse folders, which MLflow no longer writes to, and unknown schemes.

    Raises:
        InputError: see above.
    """
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    is_folder = scheme == "" or tracking_uri.startswith("file:")
    if is_folder and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        got = f"{redact(tracking_uri)}, a folder, in which MLflow no longer records"
    elif scheme not in _tracking_store_registry._registry:
        got = f"{redact(tracking_uri)}, whose scheme MLflow does not know"
    else:
        return
    raise InputError(expected=f"MLFLOW_TRACKING_URI to be {_EXAMPLES}", got=got, remedy=f"correct it, or {_LOCAL}")


def _check_others(tracking_uri: str) -> None:
    from mlflow import MlflowClient

    try:
        within(PROBE_S, lambda: MlflowClient(tracking_uri).search_experiments(max_results=1))
    except Exception as error:
        raise _no_answer(tracking_uri, error) from error


def _check_server(tracking_uri: str) -> None:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    limits = {"max_retries": 0, "timeout": PROBE_S, "raise_on_status": False}
    try:
        credentials = get_default_host_creds(tracking_uri)
        answer: Any = within(
            PROBE_S, lambda: http_request(credentials, _SEARCH, "GET", params={"max_results": 1}, **limits)
        )
    except Exception as error:
        raise _no_answer(tracking_uri, error) from error
    shown, said = without_credentials(tracking_uri), " ".join(answer.text.split())[:120]
    if answer.status_code in _DENIED:
        raise InputError(
            expected=f"to be let in by the MLflow server {shown}",
            got=redact(f"status {answer.status_code}: {said}"),
            remedy=f"set {_CREDENTIALS}; or {_LOCAL}",
        )
    if answer.status_code != 200 or not _is_of_mlflow(answer.text):
        raise InputError(
            expected=f"an MLflow server at {shown}",
            got=redact(f"status {answer.status_code} for {_SEARCH}: {said}"),
            remedy=f"correct MLFLOW_TRACKING_URI, or {_LOCAL}",
        )


def _is_of_mlflow(body: str) -> bool:
    """Return whether a body lists experiments; it is empty JSON if there are none."""
    try:
        value = json.loads(body)
    except ValueError:
        return False
    return value == {} or (isinstance(value, dict) and "experiments" in value)


def _no_answer(tracking_uri: str, error: Exception) -> InputError:
    return InputError(
        expected=f"the tracking store {without_credentials(tracking_uri)} (MLFLOW_TRACKING_URI) to answer "
        f"within {PROBE_S:.0f} s",
        got="no answer in time" if isinstance(error, TimeoutError) else reason_of(error),
        remedy=f"start it, correct MLFLOW_TRACKING_URI, or {_LOCAL}",
    )


def within(limit_s: float, call: Callable[[], _Result]) -> _Result:
    """Return what a call returns, or give up waiting; it then goes on in a thread that ends with the process.

    Raises:
        TimeoutError: it takes longer.
    """
    future: Future[_Result] = Future()

    def work() -> None:
        try:
            with quiet():
                future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            future.set_exception(error)

    threading.Thread(target=work, name="within", daemon=True).start()
    return future.result(limit_s)
