"""Layer selectors: their syntax, and expressions that would take hours."""

import time

import pytest
from pydantic import ValidationError

from dreamartist_pipeline.layer_selectors import parse_selector
from dreamartist_pipeline.params import LoRAGroup

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        (NAME, True),
        ("down_blocks.0", False),
        (r"re:.*\.attn.?", True),
        (r"re:.*\.attn.?$", False),
        (r"re:attn", False),
        (r"cls(Linear):re:.*", True),
        (r"cls(Conv2d):re:.*", False),
        (f"cls(Linear):{NAME}", True),
        ("re:(?i)DOWN", True),
    ],
)
def test_a_selector_is_a_name_or_an_expression_for_its_beginning(selector: str, matches: bool) -> None:
    assert parse_selector(selector).matches(NAME, "Linear") is matches


@pytest.mark.parametrize(
    "expression", ["(([a-z_0-9.]+)+)+!", "(.*)*(.*)*(.*)*(.*)*!", "(a|b|ab|.)*(x+x+)+y", "(.?){500}!"]
)
def test_no_expression_takes_more_than_a_moment(expression: str) -> None:
    selector = parse_selector(f"re:{expression}")
    start = time.perf_counter()
    assert not selector.matches(NAME * 20, "Linear")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("expression", ["(", "(?!attn)", r"(a)\1", "a{100000}", "[", "\ud800"])
def test_an_expression_that_re2_does_not_have_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="layer selector"):
        parse_selector(f"re:{expression}")
    with pytest.raises(ValidationError, match="layer selector|unicode"):
        LoRAGroup(lr=1.0, rank=1, layers=(f"re:{expression}",))
