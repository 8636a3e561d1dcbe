"""The tests that docs/developing.md names exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "developing.md"


def test_every_named_test_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    missing = [(file, name) for file, name in named if f"def {name}(" not in (TESTS / file).read_text(encoding="utf-8")]
    assert named
    assert not missing
