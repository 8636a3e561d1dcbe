"""The judge as a recognizer of objects in images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from dreamartist_pipeline.core.measures import recognized
from dreamartist_pipeline.embedded.recognition import JudgeRecognizer, load_recognizer, own_judge

PROJECT = Path(__file__).resolve().parents[2]
BASE_MODEL = PROJECT / "data/01_raw/base_model"


@pytest.fixture(scope="module")
def judge() -> JudgeRecognizer:
    recognizer = load_recognizer(str(BASE_MODEL))
    assert recognizer is not None
    return recognizer


def test_the_judge_belongs_to_the_base_model_beside_it_and_to_no_other(tiny_base_model: Path, tmp_path: Path) -> None:
    assert own_judge(str(BASE_MODEL)) == PROJECT / "data/01_raw/judge/judge.safetensors"
    assert load_recognizer(str(tiny_base_model)) is None
    shutil.copytree(PROJECT / "data/01_raw/judge", tmp_path / "judge")
    other = shutil.copytree(tiny_base_model, tmp_path / "base_model")  # without towers
    assert load_recognizer(str(other)) is None


def test_it_names_objects_that_it_knows_at_any_size(judge: JudgeRecognizer) -> None:
    fox = Image.open(PROJECT / "data/01_raw/reference_images/fox.png").convert("RGB")
    named = judge.objects_in([fox, fox.resize((64, 64), Image.Resampling.LANCZOS)])
    assert named[0] == named[1]
    assert set(named[0]) <= {*judge.known, "nothing"}


def test_the_reference_is_recognized_whether_or_not_the_judge_knows_its_word(judge: JudgeRecognizer) -> None:
    pictures = PROJECT / "data/01_raw/reference_images"
    fox, owl = (Image.open(pictures / f"{name}.png").convert("RGB") for name in ("fox", "owl"))
    assert "fox" not in judge.known
    wanted, values = recognized(judge, [fox, owl], fox, "fox")
    assert wanted in judge.known
    assert values.tolist() == [1, 0]
