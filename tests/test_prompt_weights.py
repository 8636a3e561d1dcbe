"""Weighted words: the syntax of the reference toolkit, by hand-derived examples."""

from __future__ import annotations

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.prompt_weights import parse_weights
from refusals import says


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
        ("a ${foo} b", [("a ", 1.0), ("${foo}", 1.0), (" b", 1.0)]),
        ("{a ${foo:2}:3}", [("a ", 3.0), ("${foo:2}", 3.0)]),
        ("(cat:1.2) [cat]", [("(cat:1.2) [cat]", 1.0)]),
    ],
)
def test_braces_become_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    parsed = parse_weights(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in parts]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in parts])


def test_the_example_of_the_inference_guide() -> None:
    """`a {cat} running {in the {city}:1.2}`: cat 1.1 times, "in the" 1.2 times, city 1.2 · 1.1 times."""
    parsed = [(text.strip(), weight) for text, weight in parse_weights("a {cat} running {in the {city}:1.2}")]
    assert [text for text, _ in parsed] == ["a", "cat", "running", "in the", "city"]
    assert [weight for _, weight in parsed] == pytest.approx([1, 1.1, 1, 1.2, 1.32])


@pytest.mark.parametrize("number", ["", "big", "1.2.3", "nan", "inf", "1e999", "1_0", "--1"])
def test_a_weight_that_is_no_number_is_refused(number: str) -> None:
    with pytest.raises(InputError, check=says(expected="{cat:1.2}", got=f"{number!r} in")):
        parse_weights(f"a {{cat:{number}}}")


@pytest.mark.parametrize(
    ("prompt", "brace"), [("a {cat", "'{' without '}'"), ("a cat}", "'}' without '{'"), ("}{", "'{' without '}'")]
)
def test_an_unbalanced_brace_is_refused(prompt: str, brace: str) -> None:
    with pytest.raises(InputError, check=says(got=f"{brace} in {prompt!r}")):
        parse_weights(prompt)


@pytest.mark.parametrize("prompt", ["{cat:1001}", "{cat:-1e4}", "{{cat:100}:100}", "{my-cat:9e307}{my-cat:9e307}"])
def test_a_weight_that_makes_noise_is_refused(prompt: str) -> None:
    with pytest.raises(InputError, check=says(expected="1000", got=prompt)):
        parse_weights(prompt)


@pytest.mark.parametrize("prompt", ["a \ud800 cat", b"caf\xe9".decode(errors="surrogateescape")])
def test_a_character_that_is_no_unicode_is_refused_in_a_message_that_can_be_printed(prompt: str) -> None:
    with pytest.raises(InputError, check=says(expected="Unicode", remedy="UTF-8")) as caught:
        parse_weights(prompt)
    str(caught.value).encode()


@pytest.mark.parametrize("prompt", ["a" * 20_001, "{" * 51 + "a" + "}" * 51, "{ " * 3000 + "}" * 3000])
def test_a_prompt_that_is_too_long_or_too_deep_is_refused_in_a_short_message(prompt: str) -> None:
    with pytest.raises(InputError, check=says(expected="at most")) as caught:
        parse_weights(prompt)
    assert len(str(caught.value)) < 500
