"""Recognition in the one-shot benchmark: its prompts, the pictures it compares, and the tables it makes of ranks."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from dreamartist_pipeline.backbones.evaluators import Evaluator
from dreamartist_pipeline.core.images import to_images, to_tensor
from dreamartist_pipeline.embedded.datasets import SpriteSetDataset
from dreamartist_pipeline.embedded.scenes import Shown
from dreamartist_pipeline.embedded.sprites import SpriteSet
from markdown_tables import cells, numbers

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "data/01_raw/reference_images"


@pytest.fixture(scope="module")
def prompting():
    return importlib.import_module("one_shot.prompts")


@pytest.fixture(scope="module")
def recognition():
    return importlib.import_module("one_shot.recognition")


@pytest.fixture(scope="module")
def reporting():
    return importlib.import_module("one_shot.report")


@pytest.fixture(scope="module")
def worlds():
    return importlib.import_module("one_shot.world")


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("score_one_shot")


# ------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("caption", "changes", "kind"),
    [
        ("a {}, blue background", {}, "background"),
        ("a red {}, blue background", {"tints": ("red",)}, "color"),
        ("a {}, flat style, blue background", {}, "style"),
        ("a small {}, blue background", {"layout": "small"}, "size"),
        ("a small red {}, blue background", {"tints": ("red",), "layout": "small"}, None),
        ("a {}", {}, None),
        ("a {}, white background", {"background": "white"}, None),
        ("a {}, blue background with red dots", {"pattern": "dotted"}, None),
        ("two {}s, blue background", {"objects": ("{}", "{}"), "tints": ("", ""), "layout": "twins"}, None),
    ],
)
def test_a_prompt_asks_for_another_background_and_at_most_one_more_thing(prompting, caption, changes, kind):
    shown = Shown(("{}",), ("",), "flat", "one", "plain", "blue", "red", caption)
    assert prompting.kind_of(dataclasses.replace(shown, **changes)) == kind


def test_every_row_is_asked_the_same_prompts_of_every_kind(prompting):
    prompts = prompting.draw_prompts(3, seed=5)
    assert prompts.kinds == ("background",) * 6 + ("color",) * 3 + ("style",) * 3 + ("size",) * 3
    assert all(template.count("{}") == 1 for template in prompts.templates)
    assert [prompting.kind_of(shown) for shown in prompts.scenes.shown] == list(prompts.kinds)
    again, other = (prompting.draw_prompts(3, seed=seed).templates for seed in (5, 6))
    assert prompts.templates == again
    assert prompts.templates != other


def test_no_background_of_plain_prompts_comes_twice_before_all_others_came_once(prompting):
    prompts = prompting.draw_prompts(5, seed=0)
    backgrounds = [shown.background for shown in prompts.scenes.shown][:10]
    assert len(set(backgrounds)) == 10


def test_a_word_takes_the_article_it_needs(prompting):
    templates = ("a {}, blue background", "an orange {}", "one {}, on a red background", "a small {}")
    assert prompting.fill(templates, "owl") == [
        "an owl, blue background",
        "an orange owl",
        "one owl, on a red background",
        "a small owl",
    ]
    assert prompting.fill(templates[:1], "fox") == ["a fox, blue background"]


# ------------------------------------------------------------------------------------------- what is there


def test_a_world_without_rendered_sprites_is_refused_before_anything_is_trained(bench, monkeypatch, tmp_path):
    def train(*_: object) -> None:
        raise AssertionError("trained")

    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "concepts", train)
    judge = str(ROOT / "data/01_raw/judge/judge.safetensors")
    options = ["--subjects", "fox", "--images", str(IMAGES), "--judge", judge]
    with pytest.raises(SystemExit, match="sprites.safetensors.*--no-recognition"):
        bench.main(options)
    with pytest.raises(AssertionError, match="trained"):
        bench.main([*options, "--no-recognition"])


def test_nothing_left_to_score_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--no-judge", "--no-recognition"])
    assert "--no-judge" in capsys.readouterr().err.splitlines()[-1]


def test_groups_of_subjects_are_disjoint_and_bundled(bench):
    development, reporting = (bench._parse(["--subjects", group]).subjects for group in bench.GROUPS)
    assert not set(development) & set(reporting)
    assert (len(development), bench._parse([]).subjects) == (5, reporting)
    for subject in (*development, *reporting):
        assert (IMAGES / f"{subject}.png").is_file()
        assert (IMAGES / f"{subject}.txt").is_file()
    assert bench._parse(["--subjects", "development", "fox"]).subjects == [*development, "fox"]


def make_world(worlds, **references: str):
    """Fox, cat and dog in every style, each a square of one colour in one half of the sprite."""
    names = [(word, style) for word in ("fox", "cat", "dog") for style in ("noto", "flat", "glossy")]
    images = torch.zeros(len(names), 4, 32, 32, dtype=torch.uint8)
    for index, (word, style) in enumerate(names):
        columns, rows = {"fox": slice(0, 32), "cat": slice(0, 10), "dog": slice(22, 32)}[word], slice(8, 32)
        images[index, 3, rows, columns] = 255
        images[index, {"noto": 0, "flat": 1, "glossy": 2}[style], rows, columns] = 250
    objects, styles = zip(*names, strict=True)
    return worlds.World(SpriteSet(images, objects, styles), ("fox", "cat"), references or {"fox": "noto"})


def test_sprites_are_read_without_those_that_have_no_name(worlds, tmp_path):
    world = make_world(worlds)
    for name, objects in (("a", ("fox", "", *["cat"] * 7)), ("b", ("dog",) * 9)):
        sprites = SpriteSet(world.sprites.images, objects, world.sprites.styles)
        SpriteSetDataset(filepath=str(tmp_path / name)).save(sprites)
    joined = worlds.read_sprites([tmp_path / "a", tmp_path / "b"])
    assert joined.objects == ("fox", *["cat"] * 7, *["dog"] * 9)
    assert torch.equal(joined.images[1], world.sprites.images[2])


def test_sprites_of_another_recipe_are_refused(worlds):
    worlds.check_drawn(make_world(worlds))
    with pytest.raises(SystemExit, match="blob fox.*make sprites"):
        worlds.check_drawn(make_world(worlds, fox="blob"))


def test_subjects_are_held_out_objects_in_a_known_style(worlds):
    from dreamartist_pipeline.params import PretrainParams
    from dreamartist_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS

    loader = CONFIG_LOADER_CLASS(conf_source=str(ROOT / "conf"), **CONFIG_LOADER_ARGS)
    recipe = PretrainParams.model_validate(loader["parameters"]["pretrain"])
    sources = IMAGES / "sources.yml"
    found = worlds.reference_styles(sources, recipe, ["fox", "owl", "mushroom-outline", "cat"])
    assert found == {"fox": "noto", "owl": "twemoji"}
    with pytest.raises(SystemExit, match="fox.*cat.*--no-recognition"):
        worlds.reference_styles(sources, recipe, ["cat"])
    with pytest.raises(SystemExit, match="nowhere/sources.yml"):
        worlds.reference_styles(Path("nowhere/sources.yml"), recipe, ["fox"])


def test_known_objects_are_in_the_fixed_gallery_and_subjects_are_not_known(worlds, recognition):
    from dreamartist_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS

    recipe = CONFIG_LOADER_CLASS(conf_source=str(ROOT / "conf"), **CONFIG_LOADER_ARGS)["parameters"]["pretrain"]
    assert len(recognition.KNOWN_OBJECTS) == 10
    assert set(recognition.KNOWN_OBJECTS) <= set(recipe["objects"])
    assert set(recognition.KNOWN_OBJECTS.values()) <= set(recipe["styles"].values())


# ------------------------------------------------------------------------------------------- pictures


def test_the_real_picture_is_in_the_style_of_the_reference_or_the_one_asked_for(prompting, recognition, worlds):
    prompts = prompting.draw_prompts(2, seed=1)
    pictures = recognition.paint_real(make_world(worlds), "fox", prompts, 64)
    for picture, kind, shown in zip(pictures, prompts.kinds, prompts.scenes.shown, strict=True):
        strongest = ("noto", "flat", "glossy")[int(picture[:, 34, 32].argmax())]  # red, green or blue
        if kind != "color":
            assert strongest == (shown.style if kind == "style" else "noto")


def stub_evaluator() -> Evaluator:
    """Pixels stand in for a network: small pictures, less their mean."""

    def features(images: torch.Tensor) -> torch.Tensor:
        return (images - images.mean(dim=(1, 2, 3), keepdim=True)).flatten(1)

    def small(images: Sequence[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": to_tensor([image.resize((16, 16), Image.Resampling.BICUBIC) for image in images]) / 2}

    return Evaluator("pixels", features, small, torch.device("cpu"))


def test_a_picture_of_the_drawing_itself_is_recognized_in_other_styles(prompting, recognition, worlds):
    world, prompts, evaluator = make_world(worlds), prompting.draw_prompts(1, seed=1), stub_evaluator()
    galleries = recognition.build_galleries(world, ("fixed", "all"), 64, evaluator)
    assert set(galleries["fixed", True].objects) == {"fox", "cat"}
    assert set(galleries["all", False].objects) == {"fox", "cat", "dog"}
    real = to_images(recognition.paint_real(world, "fox", prompts, 64))
    drawn = recognition.Drawn("real", "fox", "noto", real)
    answers = recognition.answers(drawn, prompts, galleries, evaluator)
    assert len(answers) == 2 * len(prompts)
    assert sorted(answers[answers["gallery"] == "all"]["picture"]) == list(range(len(prompts)))
    without_colors = answers[answers["kind"] == "color"]
    assert set(without_colors["rank"]) == {1}
    assert set(without_colors["nearest"]) == {"fox"}


def test_only_recoloured_prompts_are_compared_without_colours(prompting, recognition, worlds):
    """In colour the style left out is missing, and the nearest is another object of the same colour."""
    world, prompts = make_world(worlds), prompting.draw_prompts(1, seed=1)
    colored, grey = (
        recognition.Gallery(torch.eye(2), ("cat", "fox") if in_color else ("fox", "cat"), ("flat", "flat"))
        for in_color in (True, False)
    )
    galleries = {("fixed", True): colored, ("fixed", False): grey}
    evaluator = dataclasses.replace(stub_evaluator(), features=lambda images: torch.eye(2)[:1].repeat(len(images), 1))
    real = to_images(recognition.paint_real(world, "fox", prompts, 64))
    answers = recognition.answers(recognition.Drawn("real", "fox", "noto", real), prompts, galleries, evaluator)
    by_kind = answers.groupby("kind")["nearest"].first()
    assert by_kind.to_dict() == {"background": "cat", "style": "cat", "size": "cat", "color": "fox"}


def test_upper_limits_are_real_images_and_their_reconstructions(prompting, recognition, worlds):
    prompts = prompting.draw_prompts(1, seed=1)
    real, left = recognition.draw_ceilings(make_world(worlds), prompts, 64, torch.zeros_like)
    assert (real.row, left.row, real.word, real.style) == ("real", "reconstructed", "fox", "noto")
    assert len(real.images) == len(left.images) == len(prompts)
    assert left.images[0].getextrema() == ((128, 128),) * 3


# ------------------------------------------------------------------------------------------- tables


def make_answers(ranks: dict[tuple[str, str], tuple[list[int], list[int]]]) -> pd.DataFrame:
    """Ranks of plain and of hard pictures by (row, object); the hard ones ask for colour, style, size in turn."""
    lines = [
        {
            "row": row,
            "object": word,
            "gallery": "fixed",
            "group": group,
            "kind": kinds[index % len(kinds)],
            "picture": index,
            "rank": rank,
        }
        for (row, word), (plain, hard) in ranks.items()
        for group, kinds, values in (("plain", ["background"], plain), ("hard", ["color", "style", "size"], hard))
        for index, rank in enumerate(values)
    ]
    return pd.DataFrame(lines).assign(nearest=lambda frame: frame["object"].where(frame["rank"] == 1, "bee"))


CONCEPTS = {
    ("concepts", "fox"): ([1, 1, 1, 2], [1, 6, 6, 6]),
    ("concepts", "owl"): ([1, 1, 6, 6], [1, 1, 3, 5]),
}


def test_shares_are_means_over_objects_of_their_shares(reporting):
    summary = reporting.summarize(make_answers(CONCEPTS))
    means = {key[2:]: value for key, value in summary["mean"].items()}
    assert means == {("plain", 1): 0.625, ("plain", 5): 0.75, ("hard", 1): 0.375, ("hard", 5): 0.625}
    two = summary.loc[("concepts", "fixed", "hard", 1)]  # 0.25 and 0.5: a quarter of the resamples is either alone
    assert (two["low"], two["high"], two["objects"]) == (0.25, 0.5, 2)


@pytest.mark.parametrize(
    ("known_hard", "expected"),
    [
        ([1, 1, 6, 6], (37.5, 50.0, 35.0, "yes")),  # 0.7 × 50 %
        ([1, 6, 6, 6], (37.5, 25.0, 30.0, "yes")),  # the minimum
        ([1, 1, 1, 6], (37.5, 75.0, 52.5, "no")),  # 0.7 × 75 %
    ],
)
def test_targets_of_hard_prompts_are_a_factor_of_known_objects_and_a_minimum(reporting, known_hard, expected):
    ranks = {**CONCEPTS, ("known", "cat"): ([1, 1, 1, 1], known_hard)}
    table = reporting.targets_to_markdown(reporting.summarize(make_answers(ranks)))
    assert target(table, "hard, top-1") == expected
    assert target(table, "plain, top-1") == (62.5, 100.0, 90.0, "no")
    assert target(table, "plain, top-5") == (75.0, 100.0, 95.0, "no")


def target(table: str, label: str) -> tuple[float, float, float, str]:
    """Return shares of concepts and known objects, the target, and whether it is reached."""
    *shares, reached = cells(table, label)
    concepts, known, goal = (numbers(share)[0] for share in shares)
    return concepts, known, goal, reached


def test_a_target_that_is_met_exactly_is_reached(reporting):
    ranks = {("concepts", "fox"): ([1] * 9 + [2], [1]), ("known", "cat"): ([1] * 10, [1])}
    table = reporting.targets_to_markdown(reporting.summarize(make_answers(ranks)))
    assert target(table, "plain, top-1") == (90.0, 100.0, 90.0, "yes")


def test_every_row_of_the_table_has_its_interval(reporting):
    ranks = {(row, word): value for row in reporting.ROW_LABELS for (_, word), value in CONCEPTS.items()}
    table = reporting.summary_to_markdown(reporting.summarize(make_answers(ranks)))
    for label in reporting.ROW_LABELS.values():
        intervals = [numbers(cell) for cell in cells(table, label)]  # plain top-1 and top-5, hard top-1 and top-5
        assert intervals == [[62, 50, 75], [75, 50, 100], [38, 25, 50], [62, 25, 100]]
    frame = make_answers(ranks)
    both = reporting.summarize(pd.concat([frame, frame.assign(gallery="all", rank=9)]))
    assert numbers(cells(reporting.summary_to_markdown(both), label)[-1]) == [0, 0, 0]


def test_the_table_of_objects_has_their_confusions(reporting):
    ranks = {**CONCEPTS, ("known", "cat"): ([1, 1, 1, 1], [1, 1, 6, 6])}
    table = reporting.objects_to_markdown(make_answers(ranks))
    *shares, confusions = cells(table, "fox")
    assert shares == ["75%", "100%", "25%", "25%", "50%", "0%", "0%"]
    assert confusions == "bee (4)"
    assert cells(table, "cat")[:3] == ["100%", "100%", "50%"]
