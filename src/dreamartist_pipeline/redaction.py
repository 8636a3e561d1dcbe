"""Remove secrets from text that leaves the program: log lines, messages, tags and parameters."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_MIN_LENGTH = 6  # shorter values are numbers and common words, which would be hidden everywhere
_USER = re.compile(r"(?<=://)[^\s/?#'\"<>]*@")  # http://user:password@host
_USER_WITH_SLASH = re.compile(r"(?<=://)[^\s:/@'\"<>]*:(?!\d+/)[^\s@'\"<>]*@")  # SQLAlchemy allows one in a password
_QUERY = re.compile(  # presigned links of S3, Azure and Google, and tokens of other services
    r"((?:[?&;]|%3F|%26)(?:[\w.-]*(?:token|signature|credential|secret|passw|api_?key|access_?key)[\w.-]*"
    r"|sig|pwd|key|auth)=)[^&;\s'\"<>#]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:basic|bearer)\s+)?)[^\s'\",]+", re.IGNORECASE)
_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^\s:/@]*:(?!\d+/)(\S*)@")

_remembered: dict[str, str] = {}  # secret -> what is shown in its place


def redact(text: str) -> str:
    """Return a text with `***` for credentials in URIs, secret query values, and values of secret variables."""
    for secret, shown in _secrets():
        text = text.replace(secret, shown)
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _USER_WITH_SLASH.sub(f"{HIDDEN}@", text)
    return _HEADER.sub(rf"\g<1>{HIDDEN}", _QUERY.sub(rf"\g<1>{HIDDEN}", text))


def redacted(value: Any) -> Any:
    """Return a value of the configuration with all its texts redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: redacted(item) for name, item in value.items()}
    return type(value)(redacted(item) for item in value) if isinstance(value, list | tuple) else value


def without_credentials(uri: str) -> str:
    """Return a URI without user and password, to be opened by a person."""
    return redact(uri).replace(f"{HIDDEN}@", "")


def remember_secret(value: str, shown: str = HIDDEN) -> None:
    """Show another text in place of this value from now on, such as `${env:NAME}`."""
    if len(value) >= _MIN_LENGTH:
        _remembered[value] = shown


def _secrets() -> list[tuple[str, str]]:
    """Return secret values and what is shown in their place, longest first: one may be part of another."""
    named = {value for name, value in os.environ.items() if _is_secret(name)}
    password = _PASSWORD.search(os.environ.get("MLFLOW_TRACKING_URI", ""))
    from_uri = {password[1], unquote(password[1])} if password else set()
    shown = dict.fromkeys(named | from_uri, HIDDEN) | _remembered
    return [(value, shown[value]) for value in sorted(shown, key=len, reverse=True) if len(value) >= _MIN_LENGTH]


@functools.cache
def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def redact_outgoing_text() -> None:
    """Redact every log record of this process, of all libraries, and the tracebacks that Python prints."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "redacts", False):
        return

    def redacting_factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        return _redacted_record(factory(*args, **kwargs))

    redacting_factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacting_factory)
    sys.excepthook = _print_traceback
    threading.excepthook = _print_traceback_of_thread


def _redacted_record(record: logging.LogRecord) -> logging.LogRecord:
    """Replace message and traceback where they hold a secret; handlers then print them as they are."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit: logging reports them when it prints the record
        return record
    if (hidden := redact(message)) != message:
        record.msg, record.args = hidden, ()
    if record.exc_info and record.exc_info[0] is not None:
        trace = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if (hidden := redact(trace)) != trace:
            record.exc_text = hidden  # formatters print it in place of exc_info
    return record


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:  # in place of sys.excepthook
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _print_traceback_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit and args.exc_value is not None:
        _print_traceback(args.exc_type, args.exc_value, args.exc_traceback)
