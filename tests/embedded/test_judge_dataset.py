"""The judge's file, and the one that is shipped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from kedro.io import DatasetError
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from dreamartist_pipeline.core.images import to_tensor
from dreamartist_pipeline.embedded.colors import COLORS
from dreamartist_pipeline.embedded.datasets import JudgeDataset
from dreamartist_pipeline.embedded.judge import IMAGE_PX, NOTHING, Judge, JudgeVocabulary, Verdict, judge_images


@pytest.fixture
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(JudgeVocabulary(("cat", "dog"), ("flat",)), (4, 4, 8, 8))


def test_a_judge_survives_saving_and_loading_to_half_precision(judge: Judge, tmp_path: Path):
    dataset = JudgeDataset(filepath=str(tmp_path / "deep" / "judge.safetensors"))
    dataset.save(judge)
    loaded = dataset.load()
    assert (loaded.vocabulary, loaded.channels) == (judge.vocabulary, judge.channels)
    for name, value in judge.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_same_judge_gives_the_same_bytes_and_no_other_files(judge: Judge, tmp_path: Path):
    for name in ("a", "b"):
        JudgeDataset(filepath=str(tmp_path / f"{name}.safetensors")).save(judge)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_missing_judge_says_how_to_train_it(tmp_path: Path):
    with pytest.raises(DatasetError, match="absent.safetensors.*make judge"):
        JudgeDataset(filepath=str(tmp_path / "absent.safetensors")).load()


def test_a_truncated_file_is_refused(judge: Judge, tmp_path: Path):
    file = tmp_path / "judge.safetensors"
    JudgeDataset(filepath=str(file)).save(judge)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DatasetError, match="judge.safetensors.*make judge"):
        JudgeDataset(filepath=str(file)).load()


def test_weights_of_something_else_are_refused(tmp_path: Path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "judge.safetensors")
    with pytest.raises(DatasetError, match="dreamartist-judge/1.*format"):
        JudgeDataset(filepath=str(tmp_path / "judge.safetensors")).load()


# ---------------------------------------------------------------------------------------------- the shipped judge

RAW = Path(__file__).resolve().parents[2] / "data" / "01_raw"
SHIPPED = RAW / "judge" / "judge.safetensors"
LARGE = (128, 128, 110)  # centre and radius on a canvas of 256
Shape = tuple[str, tuple[int, int, int], str]  # name, where, colour


def outline(name: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a star or a heart: drawings that no sprite package has."""
    if name == "star":
        radii = [radius * (0.42 if corner % 2 else 1) for corner in range(10)]
        angles = [math.pi * corner / 5 for corner in range(10)]
        return [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]
    angles = [2 * math.pi * corner / 60 for corner in range(60)]
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(x + radius * math.sin(a) ** 3, y - radius / 16 * h) for a, h in zip(angles, heights, strict=True)]


def judged(*pictures: Image.Image) -> list[Verdict]:
    small = [picture.convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS) for picture in pictures]
    return judge_images(JudgeDataset(filepath=str(SHIPPED)).load(), to_tensor(small))


def picture(background: str, *shapes: Shape) -> Image.Image:
    canvas = Image.new("RGB", (256, 256), COLORS[background])
    for name, place, color in shapes:
        ImageDraw.Draw(canvas).polygon(outline(name, *place), fill=COLORS[color])
    return canvas


def test_the_shipped_judge_is_small():
    assert SHIPPED.stat().st_size < 10e6


@pytest.mark.parametrize(("name", "color"), [("star", "yellow"), ("heart", "red")])
def test_the_shipped_judge_knows_a_shape_drawn_here_on_every_other_colour(name: str, color: str):
    backgrounds = [background for background in COLORS if background not in ("red", "yellow")]
    verdicts = judged(*(picture(background, (name, LARGE, color)) for background in backgrounds))
    assert [one.background for one in verdicts] == backgrounds
    assert {(one.first_object, one.second_object, one.layout, one.pattern) for one in verdicts} == {
        (name, NOTHING, "one", "plain")
    }
    assert {one.first_tint for one in verdicts} == {color}


@pytest.mark.parametrize(
    ("layout", "first", "second"),
    [("beside", (67, 128, 58), (192, 128, 58)), ("stacked", (128, 67, 58), (128, 192, 58))],
)
@pytest.mark.parametrize("names", [("star", "heart"), ("heart", "star")])
def test_the_shipped_judge_knows_which_of_two_shapes_is_where(
    layout: str, first: tuple[int, int, int], second: tuple[int, int, int], names: tuple[str, str]
):
    colors = {"star": "yellow", "heart": "red"}
    shapes = [(name, place, colors[name]) for name, place in zip(names, (first, second), strict=True)]
    (verdict,) = judged(picture("purple", *shapes))
    assert (verdict.first_object, verdict.second_object, verdict.layout) == (*names, layout)
    assert (verdict.first_tint, verdict.second_tint) == tuple(colors[name] for name in names)


def test_the_shipped_judge_counts_two_of_a_kind():
    (verdict,) = judged(picture("purple", ("star", (67, 128, 58), "yellow"), ("star", (192, 128, 58), "yellow")))
    assert (verdict.first_object, verdict.second_object, verdict.layout) == ("star", "star", "twins")


def test_the_shipped_judge_sees_one_thing_on_plain_white_in_every_reference_picture():
    files = sorted((RAW / "reference_images").glob("*.png"))
    verdicts = dict(zip((file.stem for file in files), judged(*(Image.open(file) for file in files)), strict=True))
    assert len(files) > 5
    assert {(one.pattern, one.background) for one in verdicts.values()} == {("plain", "white")}
    del verdicts["pineapple"]  # it was never shown one, and may take crown and body for two things
    assert {(one.second_object, one.layout) for one in verdicts.values()} == {(NOTHING, "one")}
