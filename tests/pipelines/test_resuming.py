"""An interrupted training of a concept: continued to the same bytes, or refused by name."""

from __future__ import annotations

import functools
import logging
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from concept_bytes import concept_bytes
from dreamartist_pipeline.backbones import base_model
from dreamartist_pipeline.checkpoint_files import CheckpointStore
from dreamartist_pipeline.core.checkpoints import CONCEPT
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.course import CHECKPOINT_ENTRIES
from dreamartist_pipeline.core.divergence import Divergence, LossBounds
from dreamartist_pipeline.core.image_set import images_sha256
from dreamartist_pipeline.errors import InputError, StoppedEarly, TrainingError
from dreamartist_pipeline.interop.concept_file import read_concept
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.pipelines.training.nodes import check_training, train_concept
from dreamartist_pipeline.pipelines.training.resuming import load_kept
from refusals import says

MakeParams = Callable[..., TrainingParams]
Train = Callable[..., tuple[Concept, pd.DataFrame]]
CPU = DeviceParams(device="cpu")
STEPS, STOPPED_AFTER = 4, 2
CAPTION = "white background"


class Run:
    """A tracker that records, and that sends SIGTERM before a step."""

    def __init__(self, run_id: str = "first", stop_in: int | None = None) -> None:
        self._run_id, self._stop_in = run_id, stop_in
        self.curve: dict[int, float] = {}
        self.tags: dict[str, str] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "loss/total" in metrics:
            assert step not in self.curve
            self.curve[step] = metrics["loss/total"]
        if self._stop_in == step + 1:
            signal.raise_signal(signal.SIGTERM)

    def set_tag(self, name: str, text: str) -> None:
        self.tags[name] = text

    def run_id(self) -> str:
        return self._run_id


def picture(color: str = "orange") -> Image.Image:
    image = Image.new("RGB", (32, 32), color)
    image.paste("purple", (8, 0, 16, 32))
    return image


def images(color: str = "red") -> list[tuple[str, Callable[[], Image.Image]]]:
    return [("a cat", functools.partial(Image.new, "RGB", (32, 32), color))]


@pytest.fixture(scope="module")
def train(tiny_base_model: Path, make_training_params: MakeParams) -> Train:
    """Return what trains with checkpoints after every step in a folder; None keeps none."""

    def run(folder: Path | None, tracker: Run | None = None, **changes: Any) -> tuple[Concept, pd.DataFrame]:
        inputs = {
            "base_model": str(tiny_base_model),
            "prepared_image": picture(),
            "prepared_mask": Image.new("L", (32, 32), 127),
            "regularization_set": images(),
            "caption": CAPTION,
            "device": CPU,
            "prepared_framing": None,
        }
        inputs |= {name: changes.pop(name) for name in inputs.keys() & changes.keys()}
        kept = {"checkpoints": folder and str(folder), "checkpoint_minutes": 0.0}
        params = make_training_params(**{"num_steps": STEPS, **kept, **changes})
        settings = (inputs["base_model"], params, inputs["caption"], inputs["device"])
        return train_concept(
            **inputs,
            training_plan=check_training(*settings),
            params=params,
            tracker=tracker or Run(),
        )[:2]

    return run


def interrupt(train: Train, folder: Path, **changes: Any) -> None:
    with pytest.raises(StoppedEarly, match=f"after step {STOPPED_AFTER} of {STEPS}"):
        train(folder, Run(stop_in=STOPPED_AFTER), **changes)


@dataclass(frozen=True)
class Alone:
    """An uninterrupted training."""

    concept: bytes
    history: pd.DataFrame
    tracker: Run


@pytest.fixture(scope="module")
def alone(train: Train) -> Alone:
    """Train without interruption."""
    tracker = Run()
    concept, history = train(None, tracker)
    return Alone(concept_bytes(concept), history, tracker)


@pytest.fixture(scope="module")
def stopped(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoints of an interrupted training; copy them."""
    folder = tmp_path_factory.mktemp("stopped")
    interrupt(train, folder)
    return folder


@pytest.fixture
def kept(stopped: Path, tmp_path: Path) -> Path:
    """Return the checkpoints of an interrupted training."""
    return Path(shutil.copytree(stopped, tmp_path / "checkpoints"))


def test_the_same_call_continues_to_the_same_bytes_history_and_curves(train: Train, alone: Alone, kept: Path) -> None:
    tracker = Run("second")
    concept, history = train(kept, tracker)
    assert concept_bytes(concept) == alone.concept
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), alone.history.drop(columns="seconds"))
    assert tracker.curve == alone.tracker.curve
    assert list(tracker.curve) == [1, 2, 3, 4]
    assert tracker.tags == {"resumed_from": "first", "resumed_at_step": str(STOPPED_AFTER)}
    assert not alone.tracker.tags


def test_a_damaged_checkpoint_is_named_and_the_one_before_continues_to_the_same_bytes(
    train: Train, alone: Alone, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = kept / f"{CONCEPT}.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    tracker = Run("second")
    concept, _ = train(kept, tracker)
    assert concept_bytes(concept) == alone.concept
    assert tracker.tags["resumed_at_step"] == str(STOPPED_AFTER - 1)
    assert str(newest) in caplog.text


def test_a_training_that_lost_only_its_end_is_not_repeated(train: Train, kept: Path, alone: Alone) -> None:
    _, history = train(kept)  # nothing has removed its checkpoints
    tracker = Run("third")
    concept, again = train(kept, tracker)
    assert concept_bytes(concept) == alone.concept
    pd.testing.assert_frame_equal(again, history)
    assert tracker.tags["resumed_at_step"] == str(STEPS)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"num_steps": 5}, "training.num_steps 4 → 5"),
    "a learning rate": (
        {"words": {"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3), "lr": 0.125}},
        "training.words.lr 0.0025 → 0.125",
    ),
    "the picture": ({"prepared_image": picture("green")}, "picture "),
    "the mask": ({"prepared_mask": Image.new("L", (32, 32), 0)}, "mask "),
    "the caption": ({"caption": "on a chair"}, "caption white background → on a chair"),
    "the regularization set": ({"regularization_set": images("blue")}, "regularization set "),
    "the dtype": ({"device": CPU.model_copy(update={"dtype": "bfloat16"})}, "device.dtype float32 → bfloat16"),
}


def test_other_settings_are_refused_before_pictures_are_drawn(
    tiny_base_model: Path, make_training_params: MakeParams, kept: Path
) -> None:
    def check(**changes: Any) -> None:
        params = make_training_params(num_steps=STEPS, checkpoint_minutes=0.0, checkpoints=str(kept), **changes)
        check_training(str(tiny_base_model), params, CAPTION, CPU)

    with pytest.raises(InputError, check=says(got="training.weight_decay 0.001 → 0.5", remedy="never")):
        check(weight_decay=0.5)
    for resume in ("force", "never"):
        check(weight_decay=0.5, resume=resume)
    check()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_by_name_with_both_options(train: Train, kept: Path, name: str) -> None:
    changes, got = CHANGES[name]
    is_refusal = says(expected=f"step {STOPPED_AFTER}", got=got, remedy="training.resume=never")
    with pytest.raises(InputError, check=is_refusal) as refused:
        train(kept, **changes)
    assert "training.resume=force" in refused.value.remedy
    assert "," not in refused.value.got  # nothing else has changed


def test_another_base_model_is_refused_before_it_is_loaded(
    train: Train, kept: Path, other_tiny_base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "open_base_model", pytest.fail)
    with pytest.raises(InputError, check=says(got="base model sha256:")):
        train(kept, base_model=str(other_tiny_base_model))


def test_options_that_do_not_change_the_result_may_change(train: Train, kept: Path, alone: Alone) -> None:
    concept, _ = train(kept, preview={"every": 4}, checkpoint_minutes=1.0, max_minutes=60.0)
    assert concept_bytes(concept) == alone.concept


def test_the_minutes_of_a_training_end_it(train: Train, tmp_path: Path) -> None:
    with pytest.raises(StoppedEarly, match="training.max_minutes"):
        train(tmp_path, max_minutes=1e-9)
    assert list(tmp_path.iterdir())


def test_never_starts_anew_with_any_configuration(train: Train, kept: Path) -> None:
    tracker = Run("second", stop_in=2)
    with pytest.raises(StoppedEarly):
        train(kept, tracker, resume="never", num_steps=3)
    assert not tracker.tags
    again = Run("third")
    train(kept, again, num_steps=3)
    assert again.tags["resumed_from"] == "second"


def test_force_continues_with_changes_and_names_them(
    train: Train, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        concept, history = train(kept, resume="force", weight_decay=0.5, num_steps=6)
    assert len(history) == 6
    assert concept.metadata.num_steps == 6
    assert "training.num_steps 4 → 6" in caplog.text and "training.weight_decay 0.001 → 0.5" in caplog.text


def test_force_does_not_continue_with_another_optimizer_or_other_shapes(train: Train, kept: Path) -> None:
    groups = [{"lr": 1e-3, "rank": 3, "branch": branch, "layers": [r"re:.*\.attn.?$"]} for branch in "pn"]
    with pytest.raises(InputError, check=says(got="shapes")):
        train(kept, resume="force", lora_unet=groups)
    with pytest.raises(InputError, check=says(got="training.optimizer adamw", remedy="training.resume=never")):
        train(kept, resume="force", optimizer="schedule_free", schedule={"kind": "constant"})


def test_the_weight_decay_is_that_of_the_configuration(train: Train, kept: Path) -> None:
    """With force; torch's optimizers would load that of the checkpoint."""
    (same, _), (other, _) = (
        train(Path(shutil.copytree(kept, kept / name)), resume="force", weight_decay=decay)
        for name, decay in (("same", 1e-3), ("other", 0.5))
    )
    assert concept_bytes(same) != concept_bytes(other)
    assert any(not torch.equal(tensor, other.tensors[name]) for name, tensor in same.tensors.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9},
        {"optimizer": "schedule_free", "schedule": {"kind": "constant"}},
        {
            "optimizer": "prodigy",
            "lora_text_encoder": (),
            "lora_unet": [{"lr": 1.0, "rank": 1, "branch": b, "layers": [r"re:.*\.attn.?$"]} for b in "pn"],
        },
    ],
    ids=["averages", "schedule_free", "prodigy"],
)
def test_every_optimizer_continues_to_the_same_bytes(train: Train, tmp_path: Path, changes: dict[str, Any]) -> None:
    concept, _ = train(None, **changes)
    interrupt(train, tmp_path, **changes)
    continued, _ = train(tmp_path, **changes)
    assert concept_bytes(continued) == concept_bytes(concept)


@pytest.mark.usefixtures("warm_ranks")
def test_two_processes_stop_after_the_same_step_and_continue_to_the_same_bytes(train: Train, tmp_path: Path) -> None:
    shared = {"device": CPU.model_copy(update={"processes": 2})}
    concept, _ = train(None, **shared)
    interrupt(train, tmp_path, **shared)
    continued, history = train(tmp_path, **shared)
    assert concept_bytes(continued) == concept_bytes(concept)
    assert list(history["step"]) == [1, 2, 3, 4]


def test_a_concept_names_its_picture_and_its_whole_training(train: Train, alone: Alone) -> None:
    metadata = read_concept(alone.concept, "alone").metadata
    assert metadata.picture_sha256 == images_sha256([("", picture())])
    identities = {metadata.identity_sha256}
    for change in (
        {"prepared_image": picture("green")},
        {"prepared_mask": Image.new("L", (32, 32), 255)},
        {"regularization_set": images("blue")},
        {"caption": "black background"},
        {"weight_decay": 0.5},
    ):
        identities.add(train(None, **change)[0].metadata.identity_sha256)
    assert len(identities - {None}) == 6


# --------------------------------------------------------------------------------------------- previews


class DrawingRun(Run):
    """A tracker that keeps the last file of every name."""

    def __init__(self, run_id: str = "first", stop_in: int | None = None) -> None:
        super().__init__(run_id, stop_in)
        self.files: dict[str, Image.Image] = {}

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        pass

    def log_image_file(self, image: Image.Image, file: str) -> None:
        self.files[file] = image


def test_the_sheet_of_previews_of_a_continued_training_is_that_of_an_uninterrupted_one(
    train: Train, tmp_path: Path
) -> None:
    preview = {"every": 1, "prompts": ["a {pt1}", "two {pt1}"], "sampler": {"num_inference_steps": 1}}
    whole, stopped, continued = DrawingRun(), DrawingRun(stop_in=STOPPED_AFTER), DrawingRun("second")
    train(None, whole, preview=preview)
    with pytest.raises(StoppedEarly):
        train(tmp_path, stopped, preview=preview)
    train(tmp_path, continued, preview=preview)
    name = "training/previews.png"
    assert continued.files[name].tobytes() == whole.files[name].tobytes()
    assert stopped.files[name].width < whole.files[name].width


# --------------------------------------------------------------------------------------------- divergence

DIVERGED_AT, KEPT = 21, 10
FRAGILE = {
    **{"num_steps": 22, "checkpoint_minutes": 60.0},
    **{"schedule": {"kind": "constant"}, "words_schedule": {"kind": "constant"}},
}


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainings diverge in a step if a rate has not been lowered."""

    def divergence(bounds: LossBounds, history: list[dict[str, float]]) -> Divergence | None:
        is_high = history[-1]["step"] == DIVERGED_AT and history[-1]["lr/unet.0.positive"] >= 1e-3
        return Divergence(DIVERGED_AT, "a finite loss", "nan") if is_high else None

    monkeypatch.setattr(LossBounds, "divergence", divergence)


@pytest.mark.usefixtures("fragile")
def test_a_diverged_training_is_kept_and_goes_on_by_two_ways(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone, _ = train(None, on_divergence="halve_lr", **FRAGILE)
    folder = tmp_path / "kept"
    with pytest.raises(TrainingError, check=says(got=f"step {DIVERGED_AT}", remedy=f"step {KEPT}, is kept")):
        train(folder, **FRAGILE)
    with pytest.raises(InputError, check=says(expected=f"diverged at step {DIVERGED_AT}")) as refused:
        train(folder, **FRAGILE)  # the same command
    for remedy in ("training.resume=force", "training.on_divergence=halve_lr", "training.resume=never"):
        assert remedy in refused.value.remedy
    lower = [{"lr": 1e-4, "rank": 2, "branch": "p", "layers": [r"re:.*\.attn.?$"]}]
    lower += [{"lr": 4e-4, "rank": 1, "branch": "n", "layers": [r"re:.*\.attn.?$"]}]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    forced, history = train(copy, resume="force", lora_unet=lower, **FRAGILE)
    assert history["lr/unet.0.positive"].tolist() == [1e-3] * KEPT + [1e-4] * (22 - KEPT)
    assert not forced.doubts

    caplog.clear()
    tracker = Run("second")
    halved, history = train(folder, tracker, on_divergence="halve_lr", **FRAGILE)
    assert concept_bytes(halved) == concept_bytes(alone)
    assert history["step"].tolist() == list(range(1, 23))
    assert history["lr/unet.0.positive"].tolist() == [1e-3] * KEPT + [5e-4] * (22 - KEPT)
    assert list(tracker.curve) == list(range(1, 23))  # no step twice
    assert tracker.tags["lr_halved_at_steps"] == str(DIVERGED_AT)
    assert tracker.tags["resumed_at_step"] == str(KEPT)
    assert str(DIVERGED_AT) in tracker.tags["training_doubts"] and halved.doubts
    warnings = [record.getMessage() for record in caplog.records if "diverged at" in record.getMessage()]
    assert len(warnings) == 1 and "0.001 → 0.0005" in warnings[0]
    assert str(DIVERGED_AT) in warnings[0] and str(KEPT) in warnings[0]


def test_words_with_an_absurd_rate_stop_the_training(train: Train, tmp_path: Path) -> None:
    words = {"names": {"pt1": ("my-fox", "my-fox-neg")}, "lr": 100.0}
    is_stop = says(expected="words.", got="after step ", remedy="up to 100")
    with pytest.raises(TrainingError, check=is_stop):
        train(tmp_path, words=words, words_schedule={"kind": "constant"}, num_steps=20)
    assert not list(tmp_path.glob("*"))  # no step is good: the corrected command is not refused


def test_a_doubtful_result_is_named_once_and_tags_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LossBounds, "doubts", lambda bounds, history: ["the loss rose"])
    tracker = Run()
    concept, _ = train(None, tracker)
    assert concept.doubts == ("the loss rose",)
    assert tracker.tags == {"training_doubts": "the loss rose"}
    assert [record.levelname for record in caplog.records if "the loss rose" in record.getMessage()] == ["WARNING"]


@pytest.mark.parametrize("entry", [*CHECKPOINT_ENTRIES, "previews", "identity", "run_id"])
def test_a_checkpoint_of_another_version_is_refused_with_both_ways_on(
    make_training_params: MakeParams, tmp_path: Path, entry: str
) -> None:
    entries = {*CHECKPOINT_ENTRIES, "previews", "identity", "run_id"} - {entry}
    CheckpointStore(tmp_path).save(CONCEPT, dict.fromkeys(entries))
    params = make_training_params(checkpoints=str(tmp_path))
    with pytest.raises(InputError, check=says(expected=str(tmp_path), got=entry, remedy="training.resume=never")):
        load_kept(params)
    kept = load_kept(params.model_copy(update={"resume": "never"}))
    assert kept is not None
    assert kept.latest is None


def test_the_entries_of_a_checkpoint_are_those_that_are_read(train: Train, tmp_path: Path) -> None:
    interrupt(train, tmp_path)
    saved = CheckpointStore(tmp_path).load(CONCEPT)
    assert saved is not None
    assert saved.keys() == {*CHECKPOINT_ENTRIES, "previews", "identity", "run_id"}
