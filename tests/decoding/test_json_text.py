"""JSON from others, with bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from dreamartist_pipeline.decoding.json_text import parse_json, read_json_object, reasons
from dreamartist_pipeline.errors import InputError
from refusals import says


def test_what_diffusers_writes_is_read() -> None:
    values = parse_json(b'{"lambda_min_clipped": -Infinity, "a": [1, 2.5, "\xc3\xa9"]}')
    assert values == {"lambda_min_clipped": float("-inf"), "a": [1, 2.5, "é"]}


@pytest.mark.parametrize(
    "text",
    [b"[" * 5000 + b"]" * 5000, b"1" * 5000, b'"\\ud800"', b"\xff", b"{", b"", b"[1] [2]", b"[" + b"1," * 20 + b"1]"],
)
def test_other_texts_are_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text, max_bytes=40 if text.startswith(b"[1,1") else 100_000)


@pytest.mark.parametrize(("text", "got"), [("[1]", "a list as x.json"), ("{", "invalid JSON in x.json")])
def test_a_file_without_an_object_is_named(tmp_path: Path, text: str, got: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, check=says(expected="a thing", got=got, remedy="do this")):
        read_json_object(tmp_path / "x.json", "a thing", "x.json", "do this")


def test_reasons_name_the_first_places() -> None:
    class Sizes(BaseModel):
        width: int
        heights: list[int]

    with pytest.raises(ValidationError) as raised:
        Sizes.model_validate({"width": "wide", "heights": [1, "high", None, "x"]})
    assert reasons(raised.value, 2).startswith("width: Input should be a valid integer")
    assert reasons(raised.value, 2).count("; ") == 1
    assert "heights.1: " in reasons(raised.value)
