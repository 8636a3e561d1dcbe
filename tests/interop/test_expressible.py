"""Options of LoRA groups that files of other tools can represent."""

from __future__ import annotations

from typing import Any

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.expressible import check_expressible
from dreamartist_pipeline.params import LoRAGroup
from refusals import says

ALL_FORMATS = ("kohya", "peft", "toolkit", "embeddings")


def groups(option: dict[str, Any]) -> dict[str, list[LoRAGroup]]:
    group = LoRAGroup(**{"lr": 1e-3, "rank": 4, "layers": ["re:.*attn"], **option})
    return {"unet": [group], "text_encoder": []}


@pytest.mark.parametrize(
    ("option", "formats", "got", "remaining"),
    [
        ({"timestep_min_rank": 1}, ALL_FORMATS, "timestep_min_rank=1, which kohya, peft, toolkit, embeddings", None),
        ({"bias": True}, ALL_FORMATS, "bias=true, which kohya cannot", "export.formats=[peft,toolkit,embeddings]"),
        ({"bias": True}, ("kohya",), "bias=true, which kohya cannot", None),
    ],
)
def test_an_option_that_cannot_be_exported_is_refused_before_training(
    option: Any, formats: Any, got: str, remaining: str | None
) -> None:
    refused = says(got=f"training.lora_unet.0 with {got}", remedy="kedro run --pipelines train,evaluate")
    with pytest.raises(InputError, check=refused) as error:
        check_expressible(groups(option), formats, is_trained_here=True)
    assert ("export.formats" in error.value.remedy) == (remaining is not None)
    assert (remaining or "") in error.value.remedy


def test_a_concept_that_cannot_be_exported_can_still_generate_images() -> None:
    refused = says(got="lora_unet.0 with timestep_min_rank=1", remedy="kedro run --pipeline generate")
    with pytest.raises(InputError, check=refused) as error:
        check_expressible(groups({"timestep_min_rank": 1}), ALL_FORMATS)
    assert "training." not in error.value.got


@pytest.mark.parametrize(
    ("option", "formats"),
    [
        ({}, ALL_FORMATS),
        ({"svd_init": True}, ALL_FORMATS),
        ({"orthogonal_init": "random"}, ALL_FORMATS),
        ({"bias": True}, ("peft", "toolkit")),
    ],
)
def test_what_can_be_exported_is_accepted(option: Any, formats: Any) -> None:
    check_expressible(groups(option), formats)
