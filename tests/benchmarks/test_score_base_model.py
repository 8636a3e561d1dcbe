"""The base model's scores: what is asked of which prompt, and how verdicts become tables."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import score_base_model as bench
from dreamartist_pipeline.embedded.datasets import JudgeDataset
from dreamartist_pipeline.embedded.judge import Judge, JudgeVocabulary, Verdict, labels_of
from dreamartist_pipeline.embedded.scenes import Scenes, Shown, unseen_tints
from dreamartist_pipeline.embedded.sprites import SpriteSet
from markdown_tables import cells

VOCABULARY = JudgeVocabulary(("cat", "dog", "sun"), ("flat", "noto"))


def scene(word: str = "cat", *others: str, **changes: object) -> Shown:
    words = (word, *others)
    values = {
        "objects": words,
        "tints": ("",) * len(words),
        "style": "flat",
        "layout": "beside" if others else "one",
        "pattern": "plain",
        "background": "blue",
        "second_color": "red",
        "caption": f"a {word}, flat style, blue background",
    }
    return Shown(**{**values, **changes})


def verdict_of(shown: Shown, **changes: str) -> Verdict:
    return Verdict(**{**{head: word or "red" for head, word in labels_of(shown).items()}, **changes})


def pictures(*cases: tuple[Shown, Verdict], group: str = "any", **others: list[Verdict]) -> object:
    """Pictures of one group; each one has its own shade, so that it can be told from the others."""
    empty = torch.zeros(0)
    scenes = Scenes(empty, empty, empty, empty, empty, empty, shown=tuple(shown for shown, _ in cases))
    shades = torch.linspace(-1, 1, len(cases)).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    verdicts = {bench.GENERATED: [verdict for _, verdict in cases], **others}
    return bench.Pictures(bench.Prompts(group, scenes), {bench.GENERATED: shades}, verdicts)


# ---------------------------------------------------------------------------------------------- prompts


def test_every_object_in_every_style_can_be_asked_for() -> None:
    sprites = bench.nameable(VOCABULARY)
    pairs = set(zip(sprites.objects, sprites.styles, strict=True))
    assert pairs == {(word, style) for word in VOCABULARY.objects for style in VOCABULARY.styles}
    assert sprites.named() == list(range(6))


def test_combinations_are_single_objects_in_tints_that_training_does_or_does_not_show() -> None:
    _, seen, unseen = bench.draw_prompts(bench.nameable(VOCABULARY), 5, 30, seed=3)
    for prompts, expected in ((seen, False), (unseen, True)):
        assert len(prompts.scenes) == len(prompts.shown) == 30
        assert all(len(one.objects) == 1 for one in prompts.shown)
        assert {one.tints[0] in unseen_tints(one.objects[0]) for one in prompts.shown} == {expected}


def test_the_same_seed_draws_the_same_prompts() -> None:
    one, same, other = (bench.draw_prompts(bench.nameable(VOCABULARY), 5, 0, seed)[0] for seed in (3, 3, 4))
    assert one.scenes.captions == same.scenes.captions != other.scenes.captions


def test_real_images_are_independent_of_the_order_of_drawings() -> None:
    order = bench.nameable(VOCABULARY)
    scenes = bench.draw_prompts(order, 8, 0, seed=0)[0].scenes
    images = torch.full((6, 4, 8, 8), 255, dtype=torch.uint8)
    images[:, 0] = torch.arange(0, 240, 40, dtype=torch.uint8).view(-1, 1, 1)  # a shade of its own for every drawing
    ordered = SpriteSet(images, order.objects, order.styles)
    shuffled = SpriteSet(images.flip(0), order.objects[::-1], order.styles[::-1])
    assert torch.equal(bench.paint_real(shuffled, order, scenes), bench.paint_real(ordered, order, scenes))


def test_only_drawings_that_exist_can_be_asked_for() -> None:
    order = bench.nameable(VOCABULARY)
    some = SpriteSet(torch.zeros(5, 4, 8, 8, dtype=torch.uint8), order.objects[1:], order.styles[1:])
    asked = bench.nameable(VOCABULARY, some)
    assert (asked.objects, asked.styles) == (some.objects, some.styles)


def test_an_object_without_any_drawing_is_named() -> None:
    order = bench.nameable(VOCABULARY)
    others = [index for index, word in enumerate(order.objects) if word != "cat"]
    drawn = SpriteSet(order.images, tuple(order.objects[i] for i in others), tuple(order.styles[i] for i in others))
    with pytest.raises(SystemExit, match="cat"):
        bench.nameable(VOCABULARY, drawn)


# ---------------------------------------------------------------------------------------------- questions


def ask(question: str, shown: Shown, **changes: str) -> bool | None:
    return bench.QUESTIONS[question].asks(verdict_of(shown, **changes), shown)


def test_attributes_that_a_caption_omits_are_not_scored() -> None:
    bare = scene(caption="a cat")
    assert [ask(question, bare) for question in ("object", "style", "background", "pattern")] == [True] + [None] * 3


def test_the_object_is_scored_in_images_with_one_object() -> None:
    assert ask("object", scene()) is True
    assert ask("object", scene(), first_object="dog") is False
    assert ask("object", scene("cat", "dog")) is None


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({}, True),
        ({"first_object": "sun"}, False),
        ({"second_object": "sun"}, False),
        ({"first_object": "dog", "second_object": "cat"}, False),
        ({"layout": "stacked"}, False),
        ({"style": "noto"}, True),
    ],
)
def test_two_objects_must_both_be_there_and_in_their_places(wrong: dict[str, str], expected: bool) -> None:
    assert ask("two_objects", scene("cat", "dog"), **wrong) is expected
    assert ask("count", scene("cat", "dog"), **wrong) is None


def test_two_of_a_kind_must_be_two() -> None:
    twins = scene("cat", "cat", layout="twins")
    assert ask("count", twins) is True
    assert ask("count", twins, layout="one") is False
    assert ask("two_objects", twins) is None


def test_each_of_two_objects_must_have_its_own_colour() -> None:
    pair = scene("cat", "dog", tints=("red", "blue"))
    assert ask("two_colors", pair) is True
    assert ask("two_colors", pair, first_tint="blue", second_tint="red") is False
    assert ask("two_colors", scene("cat", "dog")) is None


# ---------------------------------------------------------------------------------------------- tables


def test_the_table_has_number_of_prompts_and_shares_by_source() -> None:
    shown = [scene("cat"), scene("dog"), scene("sun", caption="a sun"), scene("sun")]
    right = [verdict_of(one) for one in shown]
    drawn = [
        dataclasses.replace(right[0], first_object="dog"),
        *right[1:3],
        dataclasses.replace(right[3], style="noto"),
    ]
    table = bench.tabulate([pictures(*zip(shown, drawn, strict=True), **{bench.REAL: right})])
    assert table.loc["object", ["asked", "generated", "real renderings"]].tolist() == [4, 0.75, 1.0]
    assert table.loc["style", "asked"] == 3
    assert table.loc["style", "generated"] == pytest.approx(2 / 3)
    assert math.isnan(table.loc["two_objects", "generated"])


def test_unseen_combinations_are_compared_with_seen_ones() -> None:
    tinted = scene("cat", tints=("pink",))
    right, wrong = verdict_of(tinted), verdict_of(tinted, first_object="dog")
    groups = [
        pictures((tinted, right), (tinted, right)),
        pictures((tinted, right), (tinted, right), group="seen"),
        pictures((tinted, right), (tinted, wrong), group="unseen"),
    ]
    table = bench.tabulate(groups)
    assert table.loc["unseen_object", ["generated", "target"]].tolist() == [0.5, 0.9]
    assert table.loc["unseen_color", ["generated", "target"]].tolist() == [1.0, 0.9]


def test_the_table_marks_reached_targets() -> None:
    shown = scene("cat")
    table = bench.to_markdown(bench.tabulate([pictures((shown, verdict_of(shown, style="noto")))]))
    rows = {name: cells(table, bench.QUESTIONS[name].label) for name in ("object", "style", "pattern", "two_objects")}
    assert rows == {  # prompts, generated, target, reached
        "object": ["1", "100.0%", "90.0%", "yes"],
        "style": ["1", "0.0%", "85.0%", "no"],
        "pattern": ["1", "100.0%", "—", "—"],
        "two_objects": ["0", "—", "70.0%", "—"],
    }


def test_the_worst_object_is_first_with_its_confusions() -> None:
    cat, dog, pair = scene("cat"), scene("dog"), scene("cat", "dog")
    drawn = pictures(
        *((cat, verdict_of(cat)), (dog, verdict_of(dog)), (dog, verdict_of(dog, first_object="sun"))),
        (pair, verdict_of(pair)),
    )
    table = bench.by_object(drawn)
    assert table[["object", "prompts", "generated", "taken for"]].values.tolist() == [
        ["dog", 2, 0.5, "sun (1)"],
        ["cat", 1, 1.0, ""],
    ]
    assert cells(bench.objects_to_markdown(table), "dog") == ["2", "50.0%", "sun (1)"]


def test_worst_cases_start_with_the_image_with_most_errors() -> None:
    cat = scene("cat")
    drawn = pictures(
        (cat, verdict_of(cat, style="noto")),
        (cat, verdict_of(cat)),
        (cat, verdict_of(cat, first_object="dog", style="noto")),
    )
    sheet = bench.worst_cases([drawn], 5)
    assert sheet.getpixel((20, 20)) == (255, 255, 255)  # the third picture
    assert sheet.getpixel((220, 20)) == (0, 0, 0)  # the first
    assert bench.worst_cases([pictures((cat, verdict_of(cat)))], 5) is None


def test_wrong_predictions_are_named() -> None:
    dotted = scene("cat", pattern="dotted")
    assert bench.wrong_words(verdict_of(dotted, first_object="dog", second_color="pink"), dotted) == ["dog", "pink"]
    assert bench.wrong_words(verdict_of(dotted, background="green"), dotted) == ["green"]
    assert bench.wrong_words(verdict_of(dotted, style="noto"), scene("cat", pattern="dotted", caption="a cat")) == []


# ---------------------------------------------------------------------------------------------- command


@pytest.fixture
def judge_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    JudgeDataset(filepath=str(tmp_path / "judge.safetensors")).save(Judge(VOCABULARY, (4, 4, 8, 8)))
    return tmp_path / "judge.safetensors"


def test_the_command_writes_tables_and_worst_cases_without_any_drawings(
    judge_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def draw(_: object, prompts: object, first_seed: int, sampler: object) -> torch.Tensor:
        asked.append((prompts.group, first_seed))
        return torch.rand(len(prompts.scenes), 3, 64, 64) * 2 - 1

    model = SimpleNamespace(image_px=64, name="model", fingerprint="abc")
    monkeypatch.setattr(bench, "load_backbone", lambda *_: model)
    monkeypatch.setattr(bench, "draw_pictures", draw)
    monkeypatch.setattr(bench, "held_out_sprites", lambda: None)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "SPRITES", tmp_path / "absent.safetensors")
    out = tmp_path / "out"
    bench.main(["--judge", str(judge_file), "--output", str(out), "--num-prompts", "40", "--num-combinations", "4"])
    assert asked == [("any", 0), ("seen", 40), ("unseen", 44)]
    assert {file.name for file in out.iterdir()} == {"scores.md", "scores.csv", "objects.csv", "worst_cases.png"}
    assert "absent.safetensors" in capsys.readouterr().out
    assert pd.read_csv(out / "scores.csv")["asked"].iloc[0] > 0


def test_a_base_model_of_another_size_is_refused(judge_file: Path, tiny_base_model: Path) -> None:
    with pytest.raises(SystemExit, match="64 px.*32 px"):
        bench.main(["--judge", str(judge_file), "--base-model", str(tiny_base_model)])


def test_a_missing_judge_is_refused_with_the_command_that_trains_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="absent.safetensors.*make judge"):
        bench.main(["--judge", str(tmp_path / "absent.safetensors")])
