"""What is hidden in outgoing text, and where."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dreamartist_pipeline import redaction
from dreamartist_pipeline.redaction import redact, redacted, remember_secret, without_credentials
from warm_processes import warm_python


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pa55word@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg://user:p@ss@host/db", "postgresql+psycopg://***@host/db"),
        ("postgresql://user:pa/ss:1@host/db", "postgresql://***@host/db"),
        ("https://token@github.com/owner/name.git", "https://***@github.com/owner/name.git"),
        ("see 'http://u:p@h' and https://a:b@c/d", "see 'http://***@h' and https://***@c/d"),
        (
            "s3://b/k?X-Amz-Credential=AKIA&X-Amz-Signature=0a1b&part=2",
            "s3://b/k?X-Amz-Credential=***&X-Amz-Signature=***&part=2",
        ),
        ("https://h/f?sv=2020&sig=abc%3D&design=1", "https://h/f?sv=2020&sig=***&design=1"),
        ("https://h/?access_token=abc#top", "https://h/?access_token=***#top"),
        ("{'Authorization': 'Basic dXNlcjpw'}", "{'Authorization': 'Basic ***'}"),
    ],
)
def test_credentials_of_uris_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/a@b",
        "hub:owner/name@main",
        "sqlite:////a b/mlflow.db",
        "lr=0.1&steps=3",
        "a key = 3",
        "me@x.org",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-0123")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:p%40ssword@host")
    monkeypatch.setenv("SOME_TOKEN", "1")  # too short to be one
    assert redact("hf_abcdef aws-0123 p@ssword 1") == "*** *** *** 1"


def test_a_remembered_value_is_hidden_also_within_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", {})
    remember_secret("/secret/folder")
    assert redacted({"a": ["/secret/folder/x", 3], "b": ({"c": "/secret/folder"},)}) == {
        "a": ["***/x", 3],
        "b": ({"c": "***"},),
    }


def test_an_address_to_open_has_no_credentials() -> None:
    assert without_credentials("http://user:pa55word@host:5000/#/x") == "http://host:5000/#/x"


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """Return what a handler of another library prints, with redaction switched on."""
    factory, hooks = logging.getLogRecordFactory(), (sys.excepthook, redaction.threading.excepthook)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("some.library")
    logger.addHandler(handler)
    redaction.redact_outgoing_text()
    yield stream
    logger.removeHandler(handler)
    logging.setLogRecordFactory(factory)
    sys.excepthook, redaction.threading.excepthook = hooks


def test_log_lines_and_tracebacks_of_every_library_are_redacted(printed: io.StringIO) -> None:
    logger = logging.getLogger("some.library")
    logger.warning("cannot reach %s", "http://user:pa55word@host")
    try:
        raise OSError("http://user:pa55word@host is away")
    except OSError:
        logger.exception("failed")
    assert "pa55word" not in printed.getvalue()
    assert "http://***@host is away" in printed.getvalue()
    assert "Traceback" in printed.getvalue()


def test_an_uncaught_error_is_printed_without_secrets() -> None:
    program = """
from dreamartist_pipeline.redaction import redact_outgoing_text
redact_outgoing_text()
raise OSError("http://user:pa55word@host is away")
"""
    result = subprocess.run([warm_python(), "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pa55word" not in result.stderr.replace(program, "")
    assert "OSError: http://***@host is away" in result.stderr
