"""Maps of words from cross-attention: what they are, and that pictures do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dreamartist_pipeline.backbones.attention_maps import attention_probabilities, draw_with_maps
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import (
    LoadedConcept,
    attach,
    concept_metadata,
    generate,
    start_concept,
)
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams, TrainingParams
from refusals import says

SAMPLER = SamplerParams(scheduler="ddim", num_inference_steps=2, guidance_scale=3.0, batch_size=2)
PROMPTS = ["a red my-fox", "my-fox, a blue dog", "the my-fox"]
WORDS = {"positive": ["my-fox"], "negative": ["my-fox-neg"]}
SEEDS = [5, 6, 7]


def loaded_concept(backbone: Backbone) -> LoadedConcept:
    """Return a concept with a positive word of two vectors and a negative one of three."""
    params = TrainingParams(
        num_steps=0,
        words={"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3), "init_text": ("*[0.5]", "*[0.5]")},
        lora_unet=[{"lr": 1e-3, "rank": 2, "branch": b, "layers": [r"re:.*\.attn.?$"]} for b in "pn"],
    )
    concept = start_concept(backbone, params, 1, seed=0).snapshot(concept_metadata(backbone, params, 1))
    return attach(backbone, concept, StrengthParams())


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))


@pytest.fixture(scope="module")
def loaded(backbone: Backbone) -> LoadedConcept:
    return loaded_concept(backbone)


def test_attention_is_the_softmax_over_the_text_averaged_over_heads() -> None:
    query = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])  # two heads of one channel
    key = torch.tensor([[[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]]])
    found = attention_probabilities(query, key, num_heads=2, scale=1.0)
    # the first head gives 1/4 and 3/4 to the first query, all others are even
    torch.testing.assert_close(found, torch.tensor([[[0.375, 0.625], [0.5, 0.5]]]))


def test_every_row_of_attention_sums_to_one() -> None:
    query, key = torch.randn(3, 7, 8), torch.randn(3, 5, 8)
    found = attention_probabilities(query, key, num_heads=4, scale=2**-0.5)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(3, 7))


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl"])
def test_a_picture_is_the_same_with_maps_of_both_branches_in_every_family(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    backbone = load_backbone(BaseModelFiles(tiny_model(family)), DeviceParams(device="cpu"))
    loaded = loaded_concept(backbone)
    negative = "blue, my-fox-neg"
    drawn = draw_with_maps(backbone, loaded, PROMPTS, negative, SEEDS, SAMPLER, WORDS)
    plain = generate(backbone, loaded, PROMPTS, negative, SEEDS, SAMPLER)
    assert [picture.image.tobytes() for picture in drawn] == [image.tobytes() for image in plain]
    for picture in drawn:
        for branch, word in (("positive", "my-fox"), ("negative", "my-fox-neg")):
            found = picture.maps[branch][word]
            assert found.shape == (picture.image.height, picture.image.width)
            assert 0 < found.min() <= found.max() < 1


def test_the_words_of_a_prompt_share_what_start_end_and_padding_leave(
    backbone: Backbone, loaded: LoadedConcept
) -> None:
    words = {"positive": ["a", "red", "my-fox"]}
    (picture,) = draw_with_maps(backbone, loaded, PROMPTS[:1], "", SEEDS[:1], SAMPLER, words)
    total = torch.stack(list(picture.maps["positive"].values())).sum(dim=0)
    assert 0 < total.min() <= total.max() < 1


def test_a_word_of_two_vectors_has_the_attention_of_both(backbone: Backbone, loaded: LoadedConcept) -> None:
    assert loaded.prompts.positions("a red my-fox", "my-fox") == [3, 4]
    assert loaded.prompts.positions("my-fox, a MY-FOX", "my-fox") == [1, 2, 5, 6]


def test_maps_depend_on_the_picture_and_on_no_other_of_its_batch(backbone: Backbone, loaded: LoadedConcept) -> None:
    together = draw_with_maps(backbone, loaded, PROMPTS, "", SEEDS, SAMPLER, {"positive": ["my-fox"]})
    for index, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        (alone,) = draw_with_maps(backbone, loaded, [prompt], "", [seed], SAMPLER, {"positive": ["my-fox"]})
        torch.testing.assert_close(
            alone.maps["positive"]["my-fox"], together[index].maps["positive"]["my-fox"], atol=1e-5, rtol=1e-4
        )
    first, second = (picture.maps["positive"]["my-fox"] for picture in together[:2])
    assert not torch.allclose(first, second, atol=1e-4)


def test_sides_that_are_no_multiples_of_the_scales_have_maps(backbone: Backbone, loaded: LoadedConcept) -> None:
    words = {"positive": ["my-fox"]}
    (picture,) = draw_with_maps(backbone, loaded, PROMPTS[:1], "", SEEDS[:1], SAMPLER, words, size_px=(44, 28))
    assert picture.maps["positive"]["my-fox"].shape == (28, 44)


def test_the_base_model_has_maps_of_plain_words_and_keeps_no_hook(backbone: Backbone) -> None:
    base = attach(backbone, None, StrengthParams())
    (picture,) = draw_with_maps(backbone, base, ["a red cat"], "", [5], SAMPLER, {"positive": ["cat"]})
    assert set(picture.maps["positive"]) == {"cat"}
    assert not [module for module in backbone.networks["unet"].modules() if module._forward_hooks]


@pytest.mark.parametrize(
    ("words", "word", "prompt"),
    [
        ({"positive": ["fox"]}, "'fox'", "a red my-fox"),
        ({"positive": [""]}, "''", "a red my-fox"),
        ({"negative": ["my-fox-neg"]}, "my-fox-neg", "''"),
    ],
)
def test_a_word_that_a_prompt_does_not_have_is_refused_before_anything_is_drawn(
    backbone: Backbone,
    loaded: LoadedConcept,
    monkeypatch: pytest.MonkeyPatch,
    words: dict[str, list[str]],
    word: str,
    prompt: str,
) -> None:
    monkeypatch.setattr("dreamartist_pipeline.backbones.attention_maps.generate", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(InputError, check=says(expected=word, got=prompt)):
        draw_with_maps(backbone, loaded, PROMPTS[:1], "", SEEDS[:1], SAMPLER, words)


def test_a_word_beyond_the_context_is_refused(backbone: Backbone, loaded: LoadedConcept) -> None:
    prompt = "a red cat " * 8 + "fox"
    with pytest.raises(InputError, check=says(expected="'fox'", got="a red cat")):
        draw_with_maps(backbone, loaded, [prompt], "", [5], SAMPLER, {"positive": ["fox"]})


def test_scales_that_no_layer_has_are_refused(backbone: Backbone, loaded: LoadedConcept) -> None:
    words = {"positive": ["my-fox"]}
    with pytest.raises(InputError, check=says(expected="64")):
        draw_with_maps(backbone, loaded, PROMPTS[:1], "", SEEDS[:1], SAMPLER, words, scales=[64])
