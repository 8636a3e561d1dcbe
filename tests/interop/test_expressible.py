"""What files of other tools can hold of a concept, asked before a run."""

from __future__ import annotations

from typing import Any

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.expressible import check_expressible
from dreamartist_pipeline.params import LoRAGroup

ALL_FORMATS = ("kohya", "peft", "toolkit", "embeddings")


def groups(option: dict[str, Any]) -> dict[str, list[LoRAGroup]]:
    group = LoRAGroup(**{"lr": 1e-3, "rank": 4, "layers": ["re:.*attn"], **option})
    return {"unet": [group], "text_encoder": []}


@pytest.mark.parametrize(
    ("option", "formats", "message"),
    [
        (
            {"timestep_min_rank": 1},
            ALL_FORMATS,
            r"got training\.lora_unet\.0 with timestep_min_rank=1, which kohya, peft, toolkit, embeddings cannot hold; "
            r"run without the export: kedro run --pipelines train,evaluate",
        ),
        (
            {"bias": True},
            ALL_FORMATS,
            r"with bias=true, which kohya cannot hold; .* export\.formats=\[peft,toolkit,embeddings\], or run without",
        ),
        ({"bias": True}, ("kohya",), "which kohya cannot hold; run without the export"),
    ],
)
def test_what_cannot_be_exported_is_said_before_it_is_trained(option: Any, formats: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_expressible(groups(option), formats, is_trained_here=True)


def test_a_concept_in_place_that_cannot_be_exported_can_still_be_drawn_with() -> None:
    message = r"got lora_unet\.0 with timestep_min_rank=1, .*; draw with it instead: kedro run --pipeline generate"
    with pytest.raises(InputError, match=message):
        check_expressible(groups({"timestep_min_rank": 1}), ALL_FORMATS)


@pytest.mark.parametrize(
    ("option", "formats"), [({}, ALL_FORMATS), ({"svd_init": True}, ALL_FORMATS), ({"bias": True}, ("peft", "toolkit"))]
)
def test_what_can_be_exported_is_accepted(option: Any, formats: Any) -> None:
    check_expressible(groups(option), formats)
