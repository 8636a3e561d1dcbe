from __future__ import annotations

import pytest

from dreamartist_pipeline.core.captions import (
    branch_prompts,
    caption_variants,
    check_slots,
    fill_template,
    slot_names,
    without_weights,
)
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import CaptionTransformParams
from refusals import says

SHUFFLE = [CaptionTransformParams.model_validate("tag_shuffle")]


@pytest.mark.parametrize(
    ("template", "slots", "prompt"),
    [
        ("a photo of a {pt1}", {"pt1": "my-cat"}, "a photo of a my-cat"),
        ("a photo of a {pt1}", {}, "a photo of a"),
        ("a {pt1} {class}, {caption}, oil painting", {"pt1": "my-cat"}, "a my-cat, oil painting"),
        ("{caption}, {pt1}", {"pt1": "my-cat"}, "my-cat"),
        ("{caption}", {"caption": "1,000 cats,at night"}, "1,000 cats,at night"),
        ("a  {pt1} ,, {pt1}", {"pt1": "x"}, "a x, x"),
        ("{caption}", {"caption": "a {pt1} in braces", "pt1": "x"}, "a {pt1} in braces"),
        ("a {{pt1}:1.2}", {"pt1": "my-cat"}, "a {my-cat:1.2}"),
        ("a {pt1:1.2}, {dog:1.3}", {"pt1": "my-cat"}, "a {my-cat:1.2}, {dog:1.3}"),
        ("a {dog:1.3}", {"dog": "my-dog"}, "a {my-dog:1.3}"),
        ("a {{pt1}}", {"pt1": "my-cat"}, "a {my-cat}"),
        ("a ${pt1} ${} {pt1}", {"pt1": "my-cat"}, "a ${pt1} ${} my-cat"),
        ("{{caption}:1.2}, {class:0.8} a {pt1:1.2}{{{pt2}}:2}", {}, "a"),
        ("{pt1.__class__} {0} {", {"pt1": "x"}, "{pt1.__class__} {"),
    ],
)
def test_slots_are_filled_and_gaps_are_closed(template: str, slots: dict[str, str], prompt: str) -> None:
    assert fill_template(template, slots) == prompt


def test_both_branches_share_the_template_and_differ_in_the_word() -> None:
    negative, positive = branch_prompts(
        "a {pt1} {class}, {caption}", {"pt1": ("my-cat", "my-cat-neg")}, class_word="cat", caption="on a sofa"
    )
    assert negative == "a my-cat-neg cat, on a sofa"
    assert positive == "a my-cat cat, on a sofa"


def test_empty_words_give_both_branches_the_same_prompt() -> None:
    negative, positive = branch_prompts("{caption} {pt1}", {"pt1": ("", "")}, caption="a dog")
    assert negative == positive == "a dog"


def test_every_slot_has_its_own_pair() -> None:
    names = {"pt1": ("cat-p", "cat-n"), "pt2": ("style-p", "style-n")}
    assert branch_prompts("{pt1} in {pt2}", names) == ("cat-n in style-n", "cat-p in style-p")


def test_slots_without_trigger_words_get_the_class_word_once() -> None:
    assert branch_prompts("a photo of a {pt1}, {caption}", {}, "cat", "on a sofa")[1] == "a photo of a cat, on a sofa"
    assert branch_prompts("a {pt1} {class}", {}, "cat") == ("a cat", "a cat")


def test_a_weighted_name_is_a_slot_where_it_is_known_as_one() -> None:
    template = "{pt1} {pt2:1.2} {dog:1.2} {class:2} {{cat}:1.2} {two words:3}"
    assert slot_names(template) == ["pt1", "pt2", "class", "cat"]
    assert slot_names(template, {"dog": "my-dog"}) == ["pt1", "pt2", "dog", "class", "cat"]


@pytest.mark.parametrize("prompt", ["a {pt1} {class}", "{pt2}, {caption}", "a {blue:1.2} {style}", "a ${blue}", "a"])
def test_slots_of_the_concept_and_general_ones_are_known(prompt: str) -> None:
    check_slots([prompt], {"pt1": "my-cat", "style": "my-style"})


@pytest.mark.parametrize("prompt", ["a {blue} {pt1}", "{{blue}:1.2}"])
def test_an_unknown_slot_is_refused_with_the_form_of_a_weighted_word(prompt: str) -> None:
    with pytest.raises(InputError, check=says(expected="{pt1}", got="{blue} in", remedy="{blue:1.1}")):
        check_slots(["a {pt1}", prompt], {"pt1": "my-cat"})
    check_slots([prompt], {})  # without trigger words, a slot is the class word


def test_a_template_without_weights_keeps_its_slots() -> None:
    assert without_weights("a {{pt1}:1.2} on {{the {red:2} sofa}:0.5}") == "a {pt1} on the red sofa"
    assert without_weights("{dog:1.2} {dogs:1.2}", ["dog"]) == "{dog} dogs"


def test_weighted_tags_stay_whole() -> None:
    caption = "{red, {blue, green:2}:1.2}, round"
    variants = caption_variants(caption, SHUFFLE, 20, seed=0)
    assert set(variants) == {caption, "round, {red, {blue, green:2}:1.2}"}


CAPTION = "red, round, on a sofa"


def test_a_caption_without_transforms_is_its_only_variant() -> None:
    assert caption_variants("red,round", [], 9, seed=0) == ["red,round"]


def test_shuffled_tags_are_all_there_in_several_orders() -> None:
    variants = caption_variants(CAPTION, SHUFFLE, 50, seed=0)
    assert {tuple(sorted(variant.split(", "))) for variant in variants} == {("on a sofa", "red", "round")}
    assert len(set(variants)) == 6


def test_each_tag_is_dropped_by_itself_with_its_probability() -> None:
    variants = caption_variants(CAPTION, [CaptionTransformParams.model_validate({"tag_dropout": 0.25})], 2000, seed=0)
    for tag in CAPTION.split(", "):
        assert sum(tag not in variant for variant in variants) / 2000 == pytest.approx(0.25, abs=0.04)
    assert len(set(variants)) == 8


def test_all_tags_are_erased_together_with_their_probability() -> None:
    variants = caption_variants(CAPTION, [CaptionTransformParams.model_validate({"tag_erase": 0.25})], 2000, seed=0)
    assert set(variants) == {"", CAPTION}
    assert variants.count("") / 2000 == pytest.approx(0.25, abs=0.04)


def test_variants_follow_from_the_seed() -> None:
    assert caption_variants(CAPTION, SHUFFLE, 9, seed=1) == caption_variants(CAPTION, SHUFFLE, 9, seed=1)
    assert caption_variants(CAPTION, SHUFFLE, 9, seed=1) != caption_variants(CAPTION, SHUFFLE, 9, seed=2)
