"""Weighted words: the reference toolkit's syntax, by examples worked out by hand."""

from __future__ import annotations

import pytest

from dreamartist_pipeline.prompt_weights import parse_weights


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a red cat", [("a red cat", 1.0)]),
        ("a {red cat:1.2}, blue", [("a ", 1.0), ("red cat", 1.2), (", blue", 1.0)]),
        ("{cat}", [("cat", 1.1)]),
        ("{cat:0}", [("cat", 0.0)]),
        ("{cat:-.5}", [("cat", -0.5)]),
        ("{cat: 15e-1 }", [("cat", 1.5)]),
        ("ratio 16:9", [("ratio 16:9", 1.0)]),
        ("{ratio 16:9:2}", [("ratio 16:9", 2.0)]),
        ("{a{b:2}:3}c", [("a", 3.0), ("b", 6.0), ("c", 1.0)]),
        ("{{cat:2}}", [("cat", 2.2)]),
        ("{:2}{}", []),
        ("(cat:1.2) [cat]", [("(cat:1.2) [cat]", 1.0)]),
    ],
)
def test_braces_become_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    came = parse_weights(prompt)
    assert [text for text, _ in came] == [text for text, _ in parts]
    assert [weight for _, weight in came] == pytest.approx([weight for _, weight in parts])


def test_the_guides_own_example() -> None:
    """`a {cat} running {in the {city}:1.2}`: cat 1.1 times, "in the" 1.2 times, city 1.2 · 1.1 times."""
    came = [(text.strip(), weight) for text, weight in parse_weights("a {cat} running {in the {city}:1.2}")]
    assert [text for text, _ in came] == ["a", "cat", "running", "in the", "city"]
    assert [weight for _, weight in came] == pytest.approx([1, 1.1, 1, 1.2, 1.32])


@pytest.mark.parametrize("number", ["", "big", "1.2.3", "nan", "inf", "1e999", "1_0", "--1"])
def test_what_is_no_number_is_named(number: str) -> None:
    with pytest.raises(ValueError, match=f"expected a weight such as {{cat:1.2}} .* got '{number}'"):
        parse_weights(f"a {{cat:{number}}}")


@pytest.mark.parametrize(
    ("prompt", "what"), [("a {cat", "'{' without '}'"), ("a cat}", "'}' without '{'"), ("}{", "'{' without '}'")]
)
def test_a_brace_without_its_partner_is_named(prompt: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"got {what} in"):
        parse_weights(prompt)
