"""The judge: what it is asked, what counts as right, and that its disturbances change nothing that is shown."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch

from dreamartist_pipeline.embedded.judge import (
    ATTRIBUTES,
    HEADS,
    NOTHING,
    Judge,
    JudgeVocabulary,
    Verdict,
    agreement,
    attributes_in_caption,
    augment,
    draw_hard_scenes,
    judge_images,
    judge_loss,
    labels_of,
)
from dreamartist_pipeline.embedded.scenes import Shown
from dreamartist_pipeline.embedded.sprites import SpriteSet

VOCABULARY = JudgeVocabulary(("cat", "dog", "sun"), ("flat", "noto"))
CHANNELS = (4, 4, 8, 8)


def scene(**changes: object) -> Shown:
    values = {
        "objects": ("cat",),
        "tints": ("",),
        "style": "flat",
        "layout": "one",
        "pattern": "plain",
        "background": "blue",
        "second_color": "red",
        "caption": "a cat, flat style, blue background",
    }
    return Shown(**{**values, **changes})


def verdict_of(shown: Shown, **changes: str) -> Verdict:
    """The right verdict, with "red" where nothing is asked."""
    return Verdict(**{**{head: word or "red" for head, word in labels_of(shown).items()}, **changes})


def make_judge() -> Judge:
    torch.manual_seed(0)
    return Judge(VOCABULARY, CHANNELS)


TWO = scene(objects=("cat", "dog"), tints=("red", ""), layout="beside", pattern="dotted")


def test_a_verdict_equal_to_the_labels_is_right_in_every_attribute():
    assert agreement(verdict_of(TWO), TWO) == {name: True for name in ATTRIBUTES} | {"second_tint": None}


@pytest.mark.parametrize(
    ("head", "word", "attribute"),
    [
        ("first_object", "sun", "object"),
        ("second_object", NOTHING, "second_object"),
        ("style", "noto", "style"),
        ("layout", "stacked", "layout"),
        ("pattern", "plain", "pattern"),
        ("background", "pink", "background"),
        ("second_color", "pink", "background"),
        ("first_tint", "pink", "tint"),
    ],
)
def test_one_wrong_word_is_one_wrong_attribute(head: str, word: str, attribute: str):
    right = agreement(verdict_of(TWO, **{head: word}), TWO)
    assert [name for name, agrees in right.items() if agrees is False] == [attribute]


def test_objects_in_each_others_places_are_both_wrong():
    right = agreement(verdict_of(TWO, first_object="dog", second_object="cat"), TWO)
    assert (right["object"], right["second_object"]) == (False, False)


def test_missing_tints_and_second_objects_have_no_label():
    right = agreement(verdict_of(scene()), scene())
    assert {name for name, agrees in right.items() if agrees is None} == {"tint", "second_tint", "second_object"}


@pytest.mark.parametrize("pattern", ["striped", "checkered"])
def test_the_order_of_the_colours_of_stripes_and_checks_does_not_matter(pattern: str):
    one, other = (scene(pattern=pattern, background=a, second_color=b) for a, b in (("blue", "red"), ("red", "blue")))
    assert labels_of(one) == labels_of(other)
    assert agreement(verdict_of(one), other)["background"] is True


def test_blue_dots_on_red_are_not_red_dots_on_blue():
    one, other = (scene(pattern="dotted", background=a, second_color=b) for a, b in (("blue", "red"), ("red", "blue")))
    assert agreement(verdict_of(one), other)["background"] is False


def test_two_equal_objects_beside_each_other_are_labelled_twins():
    equal = scene(objects=("cat", "cat"), tints=("", ""), layout="beside")
    assert labels_of(equal)["layout"] == "twins"
    assert labels_of(dataclasses.replace(equal, tints=("red", "")))["layout"] == "beside"


@pytest.mark.parametrize(
    ("caption", "unsaid"),
    [
        ("a cat, flat style, blue background", set()),
        ("a cat, in flat style, on a blue background", set()),
        ("a cat, blue background", {"style"}),
        ("a cat, flat style", {"background", "pattern"}),
    ],
)
def test_attributes_that_the_caption_omits_are_not_in_it(caption: str, unsaid: set[str]):
    assert attributes_in_caption(scene(caption=caption)) == set(ATTRIBUTES) - unsaid


def test_training_scenes_are_balanced_and_the_same_for_the_same_seed():
    sprites = SpriteSet(torch.zeros(4, 4, 2, 2), ("cat", "dog") * 2, ("flat", "flat", "noto", "noto"))
    scenes = draw_hard_scenes(sprites, 400, seed=1)
    kinds = Counter((len(one.objects), any(one.tints)) for one in scenes.shown)
    assert len(scenes) == len(scenes.shown) == 400
    assert all(60 < kinds[kind] < 160 for kind in ((1, False), (1, True), (2, False), (2, True)))
    assert scenes.captions == draw_hard_scenes(sprites, 400, seed=1).captions


def test_every_label_is_a_class_of_its_head():
    answers = VOCABULARY.answers()
    assert set(answers) == set(HEADS)
    assert all(word in answers[head] for shown in (scene(), TWO) for head, word in labels_of(shown).items() if word)


def test_the_loss_of_a_uniform_judge_is_the_mean_log_of_the_numbers_of_classes():
    judge = make_judge()
    for head in judge.words.values():
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    everything = scene(objects=("cat", "dog"), tints=("red", "blue"), layout="beside", pattern="dotted")
    loss = judge_loss(judge, torch.zeros(1, 3, 64, 64), [everything])
    expected = sum(math.log(len(words)) for words in VOCABULARY.answers().values()) / len(HEADS)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_missing_label_has_no_gradient():
    judge = make_judge()
    judge_loss(judge, torch.zeros(1, 3, 64, 64), [scene()]).backward()
    silent = {name for name, words in judge.words.items() if not words.weight.grad.any()}
    assert silent == {"second_color", "first_tint"}  # both tints share their words


def test_a_verdict_is_the_most_likely_class_of_every_head():
    judge = make_judge()
    twins = scene(objects=("dog", "dog"), tints=("red", "red"), layout="twins", pattern="dotted")  # words are shared
    for name, words in judge.words.items():
        torch.nn.init.zeros_(words.weight)
        words.bias.data = torch.zeros_like(words.bias)
        words.bias.data[VOCABULARY.answers()[name].index(labels_of(twins)[name])] = 1
    assert judge_images(judge, torch.zeros(3, 3, 64, 64), batch_size=2) == [verdict_of(twins)] * 3


def test_both_objects_are_classified_by_the_same_weights():
    judge = make_judge()
    assert set(judge.words) == set(HEADS) - {"second_object", "second_tint"}
    logits = judge(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(logits["first_object"], logits["second_object"])  # they look at different places


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 32\]"):
        make_judge()(torch.zeros(1, 3, 32, 32))


def test_the_judge_learns_to_distinguish_two_images():
    judge = make_judge()
    images = torch.stack(
        [torch.full((3, 64, 64), -0.5), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))]
    )
    shown = [scene(), scene(objects=("dog",), style="noto", background="pink")]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        judge_loss(judge, images, shown).backward()
        optimizer.step()
    assert all(False not in agreement(*pair).values() for pair in zip(judge_images(judge, images), shown, strict=True))


def test_augmentation_depends_on_the_seed():
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    one, same, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_augmentation_keeps_range_and_colour():
    images = torch.tensor([0.6, -0.4, 0.1]).view(1, 3, 1, 1).expand(32, 3, 64, 64)
    disturbed = augment(images, torch.Generator().manual_seed(0))
    assert disturbed.abs().max() <= 1
    drift = (disturbed.mean((2, 3)) - images.mean((2, 3))).abs()
    assert 0 < drift.max() < 0.15  # of a range of 2: less than half the way to a neighbouring colour word


def test_augmentation_shifts_by_two_pixels_at_most():
    images = torch.full((32, 3, 64, 64), -1.0)
    images[:, :, :, 32:] = 1
    edge = (augment(images, torch.Generator().manual_seed(0)) > 0).float().mean((1, 2)).sum(1)  # bright columns
    assert 29 <= edge.min() < 31.5
    assert 32.5 < edge.max() <= 35
