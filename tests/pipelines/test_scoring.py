"""A training that is scored while it runs: what is measured, chosen, kept and continued."""

from __future__ import annotations

import dataclasses
import functools
import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pandas import DataFrame
from pandas.testing import assert_frame_equal
from PIL import Image

from concept_bytes import concept_bytes
from dreamartist_pipeline.core.choosing import Bounds, Score
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.divergence import Divergence, LossBounds
from dreamartist_pipeline.core.measures import CLIP_SCORE
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.tracking import NoTracker
from dreamartist_pipeline.errors import InputError, StoppedEarly
from dreamartist_pipeline.params import (
    DeviceParams,
    EvaluationParams,
    ExportParams,
    GenerateParams,
    IngestionParams,
    SamplerParams,
    ScoringParams,
    TrainingParams,
)
from dreamartist_pipeline.pipelines.export.nodes import check_files, write_files
from dreamartist_pipeline.pipelines.generate.nodes import generate_images
from dreamartist_pipeline.pipelines.training import scoring
from dreamartist_pipeline.pipelines.training.nodes import check_training, train_concept
from dreamartist_pipeline.pipelines.training.scoring import ImageMeasures, Judges
from image_sets import evaluate
from refusals import says

MakeParams = Callable[..., TrainingParams]
CPU = DeviceParams(device="cpu")
SAMPLER = {"num_inference_steps": 1, "batch_size": 4}
SCORED = {
    "every": 2,
    "prompts": ["a {pt1}, blue background"],
    "prior_prompts": ["a cat", "a dog"],
    "images_per_prompt": 1,
    "sampler": SAMPLER,
    "validation_rows": 2,
    "max_drift": 1e6,
    "max_copying": 1e6,
}
UNSCORED: dict[str, Any] = {"choose": "last", "scoring": {"every": "auto"}}
LOSSES = ["loss_reference", "loss_regularization"]


class PixelTower:
    """An image tower whose embedding is the picture, made small."""

    label = "pixels"

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        rows = [list(image.convert("RGB").resize((4, 4)).tobytes()) for image in images]
        return torch.nn.functional.normalize(torch.tensor(rows) + 1.0, dim=1)


class BrightnessScorer:
    """Scores how bright images are."""

    label, measure = "brightness", CLIP_SCORE

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        assert all("{" not in text for text in texts)
        return torch.tensor([sum(image.convert("L").resize((1, 1)).tobytes()) / 255 for image in images])


class Tracker(NoTracker):
    """Records scores and tags, and sends SIGTERM after the score of a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.scores: dict[int, dict[str, float]] = {}
        self.tags: dict[str, str] = {}
        self._stop_at = stop_at

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if any(name.startswith("scoring/") for name in metrics):
            self.scores[step] = metrics
            if step == self._stop_at:
                signal.raise_signal(signal.SIGTERM)

    def set_tag(self, name: str, text: str) -> None:
        self.tags[name] = text


@dataclasses.dataclass(frozen=True)
class Trained:
    """The results of a training."""

    concept: Concept
    history: DataFrame
    scores: DataFrame
    kept: dict[int, Concept]
    tracker: Tracker


Train = Callable[..., Trained]


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Judges:
    """Judge pictures by their pixels."""
    found = Judges(PixelTower(), BrightnessScorer(), reads_colors=False)  # type: ignore[arg-type]
    monkeypatch.setattr(Judges, "load", lambda *args: found)
    return found


@pytest.fixture
def train(tiny_base_model: Path, make_training_params: MakeParams, judges: Judges) -> Train:
    """Return what trains six steps with scores after every second one."""

    def run(tracker: Tracker | None = None, **changes: Any) -> Trained:
        tracker, device = tracker or Tracker(), changes.pop("device", CPU)
        scored = SCORED | changes.pop("scoring", {})
        lr = {"words": {"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3), "lr": 0.1}}
        usual = {"num_steps": 6, "choose": "best", "scoring": scored, "checkpoint_minutes": 0.0, **lr}
        params = make_training_params(**{**usual, **changes})
        image = Image.new("RGB", (32, 32), "orange")
        image.paste("purple", (8, 0, 16, 32))
        results = train_concept(
            base_model=str(tiny_base_model),
            prepared_image=image,
            prepared_mask=Image.new("L", (32, 32), 127),
            regularization_set=[("a cat", functools.partial(Image.new, "RGB", (32, 32), "red"))],
            training_plan=check_training(str(tiny_base_model), params, "", device),
            params=params,
            caption="",
            device=device,
            tracker=tracker,
        )
        return Trained(*results, tracker)

    return run


def fidelity_of(monkeypatch: pytest.MonkeyPatch, **by_step: float) -> None:
    """Let scores have these fidelities, in the order of the scorings."""
    values, measured = iter(by_step.values()), ImageMeasures.__call__

    def measure(self: ImageMeasures, *args: Any) -> Score:
        return dataclasses.replace(measured(self, *args), fidelity=next(values), agreement=2.0)

    monkeypatch.setattr(ImageMeasures, "__call__", measure)


# --------------------------------------------------------------------------------------------- the choice


def test_the_best_step_is_the_concept_and_the_last_is_kept(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(**UNSCORED)
    fidelity_of(monkeypatch, step_2=0.5, step_4=0.75, step_6=0.625)
    with caplog.at_level(logging.INFO):
        best = train()
    assert best.concept.metadata.step == 4 and "0.750" in str(best.concept.metadata.chosen)
    assert best.concept.tensors.keys() == plain.concept.tensors.keys()
    assert all(torch.equal(tensor, best.kept[4].tensors[name]) for name, tensor in best.concept.tensors.items())
    assert all(torch.equal(tensor, best.kept[6].tensors[name]) for name, tensor in plain.concept.tensors.items())
    assert {step: kept.metadata.step for step, kept in best.kept.items()} == {2: 2, 4: 4, 6: 6}
    assert [record.getMessage() for record in caplog.records if "Step 4 of 6" in record.getMessage()]
    assert best.tracker.tags["chosen_step"].startswith("4")
    assert best.tracker.scores.keys() == {2, 4, 6}
    assert best.scores["chosen"].tolist() == [False, True, False]
    assert len(best.history) == 6


def test_choose_last_takes_the_last_step_and_scores_if_asked(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(**UNSCORED)
    fidelity_of(monkeypatch, step_2=0.5, step_4=0.75, step_6=0.625)
    last = train(choose="last")
    assert last.concept.metadata.step == 6 and last.scores["chosen"].tolist() == [False, False, True]
    assert all(torch.equal(tensor, last.concept.tensors[name]) for name, tensor in plain.concept.tensors.items())


def test_scoring_changes_no_step_of_the_training(train: Train) -> None:
    group = {"lr": 1e-3, "rank": 2, "layers": (r"re:.*\.attn.?$",), "dropout": 0.5}
    drops = {"lora_unet": [group | {"branch": "p"}, group | {"branch": "n"}], "ema_decay": 0.5}
    plain, scored = train(**UNSCORED, **drops), train(scoring={"every": 1}, **drops)
    for name in plain.history.columns.drop("seconds"):
        assert plain.history[name].equals(scored.history[name])
    assert all(torch.equal(tensor, scored.kept[6].tensors[name]) for name, tensor in plain.concept.tensors.items())


@pytest.mark.parametrize("changes", [UNSCORED, {"scoring": {"every": "auto"}}])  # too short for a choice
def test_a_training_without_scores_has_no_steps(train: Train, changes: dict[str, Any]) -> None:
    plain = train(**changes)
    assert plain.kept == {} and len(plain.scores) == 0 and plain.tracker.scores == {}
    assert plain.concept.metadata.step is None and plain.concept.metadata.chosen is None


def test_patience_stops_a_training(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fidelity_of(monkeypatch, step_2=0.75, step_4=0.5)
    patient = {"scoring": {"patience": 1}, "checkpoints": str(tmp_path)}
    stopped = train(**patient)
    assert len(stopped.history) == 4 and stopped.concept.metadata.step == 2
    again = train(**patient)  # nothing has removed its checkpoints
    assert concept_bytes(again.concept) == concept_bytes(stopped.concept)
    assert len(again.history) == 4


def test_a_training_that_is_worse_than_another_at_a_rung_ends_there(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def halved(run: str, fidelities: tuple[float, ...], **options: Any) -> Trained:
        halving = {"folder": str(tmp_path / "rungs"), "run": run, "first": 2, "factor": 2}
        with monkeypatch.context() as patch:
            fidelity_of(patch, **{str(index): value for index, value in enumerate(fidelities)})
            return train(choose="last", scoring={"halving": halving}, checkpoints=str(tmp_path / run), **options)

    best = halved("best", (0.75, 0.5, 0.5))
    worse = halved("worse", (0.5, 0.9, 0.9))
    assert len(worse.history) == 2 and len(best.history) == 6
    again = halved("worse", ())  # nothing has removed its checkpoints
    assert len(again.history) == 2
    assert concept_bytes(again.concept) == concept_bytes(worse.concept)
    assert len(halved("worse", (0.8, 0.9, 0.9), resume="never").history) == 6


# --------------------------------------------------------------------------------------------- the same every time


def same(first: Trained, second: Trained) -> None:
    assert concept_bytes(first.concept) == concept_bytes(second.concept)
    assert_frame_equal(first.scores, second.scores)
    assert {step: concept_bytes(kept) for step, kept in first.kept.items()} == {
        step: concept_bytes(kept) for step, kept in second.kept.items()
    }
    assert first.tracker.scores == second.tracker.scores


def test_equal_trainings_have_equal_scores_also_when_interrupted(train: Train, tmp_path: Path) -> None:
    whole = train()
    same(whole, train())
    with pytest.raises(StoppedEarly):
        train(Tracker(stop_at=4), checkpoints=str(tmp_path))
    same(whole, train(checkpoints=str(tmp_path)))


@pytest.mark.usefixtures("warm_ranks")
def test_two_processes_score_and_choose_once(train: Train) -> None:
    trained = train(device=CPU.model_copy(update={"processes": 2}))
    assert trained.tracker.scores.keys() == {2, 4, 6} == trained.kept.keys()
    chosen = trained.kept[trained.concept.metadata.step or 0]
    assert all(torch.equal(tensor, chosen.tensors[name]) for name, tensor in trained.concept.tensors.items())


def test_a_training_that_goes_back_forgets_the_later_scores(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def divergence(bounds: LossBounds, history: list[dict[str, float]]) -> Divergence | None:
        is_high = history[-1]["step"] == 25 and history[-1]["lr/unet.0.positive"] >= 1e-3
        return Divergence(25, "a finite loss", "nan") if is_high else None

    constant = {"schedule": {"kind": "constant"}, "words_schedule": {"kind": "constant"}}
    halved = {"num_steps": 26, "on_divergence": "halve_lr", "scoring": {"every": 8}, **constant}
    with monkeypatch.context() as patched:
        patched.setattr(LossBounds, "divergence", divergence)
        trained = train(**halved)
    plain = train(**halved)
    assert trained.scores["step"].tolist() == [8, 16, 24, 26] == list(trained.kept)
    assert trained.scores[LOSSES].iloc[0].equals(plain.scores[LOSSES].iloc[0])  # before the state it went back to
    assert not trained.scores[LOSSES].iloc[2].equals(plain.scores[LOSSES].iloc[2])


def test_few_concepts_are_kept_of_a_long_training(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "most_kept", lambda size: 2)
    fidelity_of(monkeypatch, step_1=0.5, step_2=0.9, step_3=0.3, step_4=0.4, step_5=0.5, step_6=0.6)
    trained = train(scoring={"every": 1})
    assert list(trained.kept) == [2, 6] and trained.concept.metadata.step == 2
    assert len(trained.scores) == 6


# --------------------------------------------------------------------------------------------- generating


def test_images_are_drawn_from_a_kept_step(train: Train, tiny_base_model: Path) -> None:
    trained = train(scoring={"every": 3})
    kept = {step: functools.partial(trained.kept.__getitem__, step) for step in trained.kept}

    def drawn(concept: Concept, **changes: Any) -> bytes:
        params = GenerateParams(prompts=["a {pt1}"], images_per_prompt=1, sampler=SAMPLER, **changes)
        (image,) = generate_images(str(tiny_base_model), concept, params, CPU, concept_steps=kept)[0].values()
        return image.tobytes()

    assert drawn(trained.concept, step=3) == drawn(trained.kept[3]) != drawn(trained.kept[6])
    with pytest.raises(InputError, check=says(expected="3, 6", got="4")):
        drawn(trained.concept, step=4)


def test_evaluation_and_export_take_a_kept_step(train: Train, tiny_base_model: Path) -> None:
    trained = train(scoring={"every": 3}, choose="last")
    kept = {3: lambda: trained.kept[3]}
    base_model, device, tracker = ModelLocation(str(tiny_base_model)), CPU, NoTracker()
    export = ExportParams(title="fox", step=3)
    files = write_files(base_model, trained.concept, export, kept)
    plain = export.model_copy(update={"step": None})
    assert files == write_files(base_model, trained.kept[3], plain) != write_files(base_model, trained.concept, plain)
    _, report = check_files(base_model, trained.concept, files, export, kept)
    assert report["files"]
    shown = {"prompts": ["a {pt1}"], "prior_prompts": ["a cat"], "sampler": SAMPLER}
    params = EvaluationParams(**shown, step=4, other_picture=True)
    with pytest.raises(InputError, check=says(expected="evaluation.step", got="4")):
        evaluate(
            base_model,
            trained.concept,
            Image.new("RGB", (32, 32)),
            params=params,
            ingestion=IngestionParams(bucket={"side_px": 32, "multiple_px": 8}),
            device=device,
            tracker=tracker,
            concept_steps=kept,
        )


# --------------------------------------------------------------------------------------------- measuring


def score(measure: ImageMeasures, *images: Image.Image) -> Score:
    return measure(1, images, (1.0, None))


def squares(color: str, *others: str) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), each) for each in (color, *others)]


def test_drift_is_relative_to_the_distances_among_the_base_models_images(
    judges: Judges, make_training_params: MakeParams
) -> None:
    params = make_training_params(scoring=SCORED)
    base = squares("green", "red", "blue")  # one of a subject prompt, two of prior prompts
    measure = ImageMeasures(judges, squares("orange")[0], params, base)
    assert score(measure, *base).drift == pytest.approx(0, abs=1e-5)
    assert score(measure, *squares("green", "blue", "red")).drift == pytest.approx(1, rel=1e-4)


def test_copying_is_0_for_the_base_model_and_for_an_object_alone_and_1_for_copies(
    judges: Judges, make_training_params: MakeParams
) -> None:
    params = make_training_params(scoring=SCORED)
    reference, other = squares("white", "blue")
    for each in (reference, other):
        each.paste("red", (8, 8, 24, 24))
    base = squares("green", "red", "blue")
    measure = ImageMeasures(judges, reference, params, base)
    assert score(measure, *base).copying == 0
    assert score(measure, reference, *base[1:]).copying == pytest.approx(1, abs=1e-4)
    assert score(measure, other, *base[1:]).copying < 0.05  # with another background
    assert score(measure, reference, *base[1:]).fidelity == pytest.approx(1, abs=1e-4)


def test_agreement_is_the_share_of_backgrounds_or_the_score_of_a_model_or_unmeasured() -> None:
    tower, texts = PixelTower(), BrightnessScorer()
    templates, images = ["a {pt1}, black background", "a {pt1}, red background"], squares("black", "black")
    assert Judges(tower, texts, reads_colors=True).agreement(templates, images, "fox") == 0.5  # type: ignore[arg-type]
    assert Judges(tower, texts, reads_colors=True).agreement(["a {pt1}"] * 2, images, "fox") == pytest.approx(0)  # type: ignore[arg-type]
    assert Judges(tower, None, reads_colors=False).agreement(templates, images, "fox") is None  # type: ignore[arg-type]


def test_a_base_model_without_towers_is_judged_by_efficientnet_and_says_that_agreement_is_unmeasured(
    tiny_base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "load_evaluator", lambda name, device: name)
    loaded = Judges.load(str(tiny_base_model), ScoringParams(), torch.device("cpu"))  # type: ignore[arg-type]
    assert loaded == Judges("efficientnet-lite0", None, reads_colors=False)  # type: ignore[arg-type]


def test_named_models_judge_in_place_of_the_usual_ones(tiny_base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "load_evaluators", lambda names, model, device: names)
    monkeypatch.setattr(scoring, "load_text_image_model", lambda name, model, device: name)
    named = ScoringParams(evaluator="dinov2:/models/dino", text_image_model="clip:/models/clip")
    loaded = Judges.load(str(tiny_base_model), named, torch.device("cpu"))  # type: ignore[arg-type]
    assert (loaded.images, loaded.texts) == ("dinov2:/models/dino", "clip:/models/clip")


def test_prompts_seeds_and_sampler_are_those_of_the_images(
    monkeypatch: pytest.MonkeyPatch, make_training_params: MakeParams
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(scoring, "generate", lambda *args, **options: drawn.append((*args[2:], options["size_px"])))
    scored = {"prompts": ["a {pt1}", "the {pt1}"], "prior_prompts": ["a cat"], "images_per_prompt": 3, "seed": 7}
    params = make_training_params(scoring={**scored, "sampler": SAMPLER}, class_word="fox")
    for words in (params.words.names, {}):
        scoring.images_of(None, None, params, words, (32, 24))  # type: ignore[arg-type]
    prompts = ["a my-fox"] * 3 + ["the my-fox"] * 3 + ["a cat"]
    with_word, of_base = drawn
    assert with_word == (prompts, "", [7, 8, 9, 7, 8, 9, 7], SamplerParams(**SAMPLER), (32, 24))
    assert of_base[0] == [prompt.replace("my-fox", "fox") for prompt in prompts]


def test_validation_draws_nothing_of_the_training_and_is_the_same_at_every_step(train: Train) -> None:
    frozen = {"words": {"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3), "lr": 1e-12}}
    groups = {name: [] for name in ("lora_unet", "lora_text_encoder")}
    losses = train(**frozen, **groups).scores[LOSSES]
    assert losses["loss_reference"].nunique() == losses["loss_regularization"].nunique() == 1
    more = train(scoring={"validation_rows": 3}, **frozen, **groups).scores[LOSSES]
    assert more["loss_reference"][0] != losses["loss_reference"][0]


def test_bounds_are_in_the_table(train: Train) -> None:
    trained = train(scoring={"max_drift": 0.25, "max_copying": 0.125, "agreement_loss": 0.5})
    row = trained.scores.iloc[0]
    assert (row["drift_bound"], row["copying_bound"]) == (0.25, 0.125)
    assert row["agreement_bound"] == pytest.approx(row["agreement_of_base"] / 2)
    assert Bounds.of(ScoringParams(), None).agreement is None


def test_prompts_without_prior_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="prior_prompts"):
        ScoringParams(prompts=["a {pt1}"])
