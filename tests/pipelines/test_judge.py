"""The judge pipeline on a world of two hand-drawn sprites: from SVG to a measured judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreamartist_pipeline.checkpoint_files import CheckpointStore
from dreamartist_pipeline.embedded.judge import NOTHING, Verdict, labels_of
from dreamartist_pipeline.embedded.scenes import Shown
from dreamartist_pipeline.embedded.sprites import SpriteSet
from dreamartist_pipeline.params import JudgeParams
from dreamartist_pipeline.pipelines.judge.measuring import accuracy_report
from dreamartist_pipeline.pipelines.judge.nodes import measure_judge, train_judge


class RecordingTracker:
    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics


@pytest.fixture
def sprites() -> SpriteSet:
    """A red and a blue square in two sizes, for styles."""
    images = torch.zeros(4, 4, 16, 16, dtype=torch.uint8)
    for index in range(4):
        inset = 4 * (index // 2)
        images[index, 3, inset : 16 - inset, inset : 16 - inset] = 255
        images[index, 0 if index % 2 else 2] = 255
    return SpriteSet(images, ("apple", "whale") * 2, ("flat", "flat", "noto", "noto"))


@pytest.fixture
def params(tmp_path: Path) -> JudgeParams:
    training = {
        "num_steps": 4,
        "batch_size": 2,
        "lr": 1e-3,
        "checkpoint_minutes": 0.0,
        "num_scenes": 16,
        "warmup_steps": 1,
    }
    return JudgeParams(channels=(4, 4, 8, 8), training=training, num_test_scenes=40, checkpoints=str(tmp_path))


def test_a_judge_knows_the_words_of_its_sprites(sprites: SpriteSet, params: JudgeParams):
    judge = train_judge(sprites, params, RecordingTracker())
    assert judge.vocabulary.objects == ("apple", "whale")
    assert judge.vocabulary.styles == ("flat", "noto")


def test_an_interrupted_training_resumes_to_the_same_weights(
    sprites: SpriteSet, params: JudgeParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = CheckpointStore.save

    def save_and_interrupt(store: CheckpointStore, name: str, checkpoint: dict[str, Any]) -> None:
        save(store, name, checkpoint)
        raise KeyboardInterrupt

    whole = train_judge(sprites, params, RecordingTracker())
    other = params.model_copy(update={"checkpoints": str(tmp_path / "other")})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointStore, "save", save_and_interrupt)
        train_judge(sprites, other, RecordingTracker())
    resumed = train_judge(sprites, other, RecordingTracker())
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_every_accuracy_is_reported_and_tracked(sprites: SpriteSet, params: JudgeParams):
    tracker = RecordingTracker()
    judge = train_judge(sprites, params, tracker)
    report = measure_judge(judge, sprites, params, tracker)
    assert tracker.metrics["judge/samples"] == 4 * 2  # steps times batch size
    assert report["num_scenes"]["all"] == 40
    assert tracker.metrics["judge/one_object/object"] == report["accuracy"]["one_object"]["object"]
    assert 0 < report["accuracy"]["all"]["object"] < 1  # a guess between two, by a judge that has hardly trained


def test_accuracies_are_shares_of_the_scenes_with_a_label():
    def shown(word: str, tint: str = "") -> Shown:
        return Shown((word,), (tint,), "flat", "one", "plain", "blue", "red", "")

    def verdict(one: Shown, **changes: str) -> Verdict:
        return Verdict(**{**{head: word or NOTHING for head, word in labels_of(one).items()}, **changes})

    scenes = [shown("apple"), shown("apple"), shown("whale", "red"), shown("whale", "pink")]
    verdicts = [verdict(one) for one in scenes]
    verdicts[0] = verdict(scenes[0], first_object="whale")
    verdicts[3] = verdict(scenes[3], first_tint="red")
    report = accuracy_report(verdicts, scenes)
    assert report["accuracy"]["all"] == {
        **{"object": 0.75, "style": 1.0, "background": 1.0, "pattern": 1.0, "tint": 0.5, "layout": 1.0}
    }
    assert report["accuracy"]["two_objects"] == {}
    assert [report["accuracy"][kind]["object"] for kind in ("own_colors", "tinted")] == [0.5, 1.0]
    assert report["confusions"]["first_object"] == [
        {"true": "apple", "judged": "whale", "object": "apple", "scenes": 1}
    ]
