"""Evaluation: measured numbers on hand-made pictures, and the whole node on a tiny base model."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw

from dreamartist_pipeline.backbones import concepts
from dreamartist_pipeline.core import processes
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.image_set import images_sha256
from dreamartist_pipeline.core.measures import CLIP_SCORE
from dreamartist_pipeline.datasets.user_files import UserPicturesDataset
from dreamartist_pipeline.embedded.colors import COLORS
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.drawn_pictures import read_pictures
from dreamartist_pipeline.params import (
    BucketParams,
    DeviceParams,
    EvaluationParams,
    IngestionParams,
    SamplerParams,
    StrengthParams,
    TrainingParams,
)
from dreamartist_pipeline.pipelines.evaluation import create_pipeline, drawing
from dreamartist_pipeline.pipelines.evaluation.measuring import (
    BASE,
    CONCEPT,
    Ablation,
    Drawings,
    EvaluationImages,
    measure,
)
from dreamartist_pipeline.pipelines.evaluation.nodes import (
    check_evaluation,
    check_picture,
    check_recognition,
    check_views,
    draw_base_images,
    evaluate_concept,
    prepare_views,
)
from dreamartist_pipeline.pipelines.evaluation.sheet import _sampling_line
from image_sets import drawn, evaluate
from refusals import says

CPU = DeviceParams(device="cpu")
INGESTION = IngestionParams(bucket=BucketParams(side_px=32, multiple_px=8))


def _picture(background: str, inside: str) -> Image.Image:
    image = Image.new("RGB", (32, 32), COLORS[background])
    ImageDraw.Draw(image).rectangle((8, 8, 23, 23), fill=COLORS[inside])
    return image


class MeanColor:
    """An evaluator whose embedding is the picture's mean colour."""

    label = "mean-color"

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        rows = [torch.tensor(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))).float() for image in images]
        return torch.nn.functional.normalize(torch.stack(rows) + 1e-3, dim=1)


class RecordingTracker:
    def __init__(self) -> None:
        self.images: dict[str, Image.Image] = {}

        self.tags: dict[str, str] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        raise AssertionError("numbers are an output")

    def set_tag(self, name: str, text: str) -> None:
        self.tags[name] = text

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        self.images[key] = image


@pytest.fixture
def images() -> EvaluationImages:
    """Two prompts, two seeds: the base misses half of the backgrounds and the red, the concept none of them."""
    templates = ("a {pt1}, blue background", "a red {pt1}, green background")
    base = [[_picture("blue", "orange"), _picture("pink", "orange")], [_picture("green", "yellow")] * 2]
    ours = [[_picture("blue", "orange"), _picture("blue", "yellow")], [_picture("green", "red")] * 2]
    prior = [[Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32), "black")]]
    drifted = [[Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32), (51, 51, 51))]]
    return EvaluationImages(
        reference=_picture("white", "orange"),
        reconstruction=_picture("white", "orange"),
        subject={
            BASE: Drawings(templates, ["a fox, blue background", "a red fox, green background"], (7, 8), base),
            CONCEPT: Drawings(templates, ["a my-fox, blue background", "a red my-fox, green background"], (7, 8), ours),
        },
        prior={
            BASE: Drawings(["a cat"], ["a cat"], (7, 8), prior),
            CONCEPT: Drawings(["a cat"], ["a cat"], (7, 8), drifted),
        },
    )


def test_agreement_is_the_share_of_images_that_follow_the_prompt(images: EvaluationImages) -> None:
    metrics = measure(images, [], color_agreement=True).metrics
    assert metrics["prompt/background.base"] == 0.75
    assert metrics["prompt/background.concept"] == 1.0
    assert metrics["prompt/color.base"] == 0.0
    assert metrics["prompt/color.concept"] == 1.0


def test_colours_are_read_where_asked_for_alone(images: EvaluationImages) -> None:
    measured = measure(images, [])
    assert not [name for name in (*measured.metrics, *measured.rows[0]) if "agree" in name or "prompt/" in name]


def test_clip_scores_compare_images_with_prompts_in_which_the_class_word_stands_for_the_subject(
    images: EvaluationImages,
) -> None:
    asked: list[list[str]] = []

    class OnePoint:
        measure = CLIP_SCORE

        def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
            asked.append(list(texts))
            assert len(images) == len(texts)
            return torch.tensor([0.25, 0.5, 0.75, 1.0][: len(images)])

    measured = measure(dataclasses.replace(images, class_word="fox"), [], OnePoint())
    prompts = ["a fox, blue background", "a red fox, green background"]
    assert asked == [[text for text in prompts for _ in range(2)]] * 2 + [prompts] * 2  # the reference with each
    assert measured.metrics["prompt/clip_score.reference"] == 0.375
    assert measured.metrics["prompt/clip_score.base"] == measured.metrics["prompt/clip_score.concept"] == 0.625
    assert [row.get("clip_score") for row in measured.rows[:5]] == [0.25, 0.5, 0.75, 1.0, 0.25]
    assert "prompt/clip_score.base" not in measure(images, []).metrics


def test_prior_drift_is_the_mean_distance_of_both_models_images(images: EvaluationImages) -> None:
    assert measure(images, []).metrics["prior_drift/pixels"] == pytest.approx((0 + 51 / 255) / 2)


def test_similarity_is_that_of_the_object_whatever_the_background(images: EvaluationImages) -> None:
    measured = measure(images, [MeanColor()])
    first = next(row for row in measured.rows if row["group"] == CONCEPT and row["seed"] == 7)
    assert first["mean-color/similarity"] == pytest.approx(1.0, abs=1e-6)  # orange on blue, against orange on white
    assert measured.metrics["similarity/ceiling.mean-color"] == pytest.approx(1.0, abs=1e-6)
    values = [
        row["mean-color/similarity"] for row in measured.rows if row["group"] == CONCEPT and row["kind"] == "subject"
    ]
    assert measured.metrics["similarity/concept.mean-color"] == pytest.approx(sum(values) / 4, abs=1e-6)


def test_copying_counts_the_nearest_image_background_included(images: EvaluationImages) -> None:
    copied = Drawings(("a {pt1}",), ["a my-fox"], (7, 8), [[images.reference, _picture("black", "teal")]])
    subject = {BASE: images.subject[BASE], CONCEPT: copied}
    measured = measure(EvaluationImages(images.reference, images.reference, subject, images.prior), [MeanColor()])
    assert measured.metrics["variety/copying.concept.pixels"] == 1.0
    assert measured.metrics["variety/copying.concept.mean-color"] == pytest.approx(1.0, abs=1e-6)
    assert measured.metrics["variety/copying.base.pixels"] < 0.9


def test_diversity_is_zero_where_all_seeds_give_one_image(images: EvaluationImages) -> None:
    same = [[_picture("blue", "red")] * 2] * 2
    drawings = Drawings(images.subject[BASE].templates, ["x", "y"], (7, 8), same)
    subject = {BASE: images.subject[BASE], CONCEPT: drawings}
    metrics = measure(
        EvaluationImages(images.reference, images.reference, subject, images.prior), [MeanColor()]
    ).metrics
    assert metrics["variety/diversity.concept.mean-color"] == pytest.approx(0, abs=1e-6)
    assert metrics["variety/diversity.base.mean-color"] > 0.001


def test_what_nothing_asks_for_is_left_out(images: EvaluationImages) -> None:
    one = {group: Drawings(("a {pt1}",), ["a fox"], (7,), [[_picture("blue", "red")]]) for group in (BASE, CONCEPT)}
    only = EvaluationImages(images.reference, images.reference, one, images.prior)
    metrics = measure(only, [MeanColor()], color_agreement=True).metrics
    assert not [name for name in metrics if "agreement" in name or "diversity" in name]
    assert all(math.isfinite(value) for value in metrics.values())


def test_floor_and_ceilings_are_beside_each_measure(images: EvaluationImages) -> None:
    table = {(row["measure"], row["by"]): row for row in measure(images, [MeanColor()], color_agreement=True).table()}
    row = table["similarity", "mean-color"]
    assert row["concept_low"] <= row["concept"] <= row["concept_high"] <= 1
    assert row["base_low"] <= row["base"] <= row["base_high"]
    assert (row["reference"], row["ceiling"]) == pytest.approx((1, 1))
    assert (table["variety/copying", "pixels"]["reference"], row["images"]) == (1, 4)
    assert table["copying/crop_distance", "mean-color"]["reference"] == pytest.approx(0, abs=1e-6)
    assert table["prior_drift", "pixels"]["base"] == 0
    assert table["prompt/background", ""]["reference"] == 0  # white, for blue and green


def test_what_is_not_measured_is_in_the_table_with_its_reason(images: EvaluationImages) -> None:
    measured = measure(images, [])
    rows = [row for row in measured.table() if row["left_out"]]
    reasons = {(row["measure"], row["condition"]): row["left_out"] for row in rows}
    assert reasons == measured.left_out
    names = {name for name, _ in reasons}
    assert {"similarity", "prompt/clip_score", "recognition", "similarity_unseen", "prompt/color"} <= names
    assert "evaluation.evaluators" in reasons["similarity", ""]
    assert all(math.isnan(row["concept"]) and not row["images"] for row in rows)
    assert "prompt/clip_score, effect/agreement, guidance/agreement (" in measured.not_measured()


def test_an_effect_is_the_change_from_the_same_prompt_and_seed(images: EvaluationImages) -> None:
    ours = images.subject[CONCEPT]
    worse = dataclasses.replace(ours, images=[[_picture("blue", "blue")] * 2] * 2)
    effects = {"negative_adapter": Ablation(ours, worse), "negative_word": Ablation(ours, ours)}
    measured = measure(dataclasses.replace(images, branches=effects), [MeanColor()]).metrics
    assert measured["effect/similarity.negative_adapter.mean-color"] > 0.1
    assert measured["effect/distance.negative_adapter.pixels"] > 0.05
    for name in ("distance", "similarity"):
        assert measured[f"effect/{name}.negative_word.mean-color"] == pytest.approx(0, abs=1e-6)
    assert measured["intervals/effect.similarity.negative_word.mean-color.high"] == pytest.approx(0, abs=1e-6)


def test_guidance_scales_are_measured_one_by_one_beside_the_same_floor(images: EvaluationImages) -> None:
    scales = {2.0: images.subject[CONCEPT].of_first_seeds(1), 7.5: images.subject[BASE].of_first_seeds(1)}
    measured = measure(dataclasses.replace(images, guidance=scales), [MeanColor()])
    values = [measured.metrics[f"guidance/similarity.{scale}.mean-color"] for scale in ("2", "7.5")]
    assert values[0] != values[1]
    rows = [row for row in measured.table() if row["measure"] == "guidance/similarity"]
    assert [row["condition"] for row in rows] == ["2", "7.5"]
    assert rows[0]["base"] == measured.metrics["similarity/base.mean-color"]
    assert rows[0]["images"] == 2


def _params(**changes: object) -> EvaluationParams:
    values = {
        "prompts": ("a {pt1}, blue background", "a {pt1} on the left and a cat on the right"),
        "prior_prompts": ("a red cat",),
        "class_word": "fox",
        "images_per_prompt": 2,
        "sampler": SamplerParams(num_inference_steps=2, batch_size=4),
    }
    return EvaluationParams(**{**values, **changes})


def _evaluate(
    base_model: Path, concept: Concept, params: EvaluationParams, device: DeviceParams = CPU
) -> tuple[Image.Image, dict[str, float], pd.DataFrame]:
    picture = _picture("white", "red")
    sheet, metrics, _, table, _, _ = evaluate(
        str(base_model),
        concept,
        picture,
        params=params,
        ingestion=INGESTION,
        device=device,
        tracker=RecordingTracker(),
    )
    return sheet, metrics, table


@pytest.fixture(scope="module")
def zero_step_concept(tiny_base_model: Path) -> Concept:
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
    from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept

    params = TrainingParams(
        num_steps=0,
        words={"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (1, 2), "init_text": ("fox", "fox")},
        lora_unet=[{"lr": 1e-3, "rank": 2, "branch": b, "layers": [r"re:.*\.attn.?$"]} for b in "pn"],
    )
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    return start_concept(backbone, params, 1, seed=0).snapshot(concept_metadata(backbone, params, 1))


@pytest.mark.usefixtures("warm_ranks")
def test_two_processes_draw_the_images_of_one(
    tiny_base_model: Path, zero_step_concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_WORTH_STARTING_S", 0)
    params = _params(sampler=SamplerParams(num_inference_steps=1, batch_size=1), evaluators=())
    one, two = (
        _evaluate(tiny_base_model, zero_step_concept, params, CPU.model_copy(update={"processes": count}))
        for count in (1, 2)
    )
    assert one[0].tobytes() == two[0].tobytes()
    assert one[1] == two[1]


def test_the_node_returns_sheet_metrics_and_table_and_tracks_the_sheet(
    tiny_base_model: Path, zero_step_concept: Concept
) -> None:
    tracker = RecordingTracker()
    reference = _picture("white", "orange")
    sheet, metrics, scores, table, measured, pictures = evaluate(
        str(tiny_base_model),
        zero_step_concept,
        reference,
        params=_params(),
        ingestion=INGESTION,
        device=CPU,
        tracker=tracker,
    )
    assert isinstance(sheet, Image.Image)
    assert metrics == json.loads(json.dumps(metrics))
    assert scores == {name: {"value": value, "step": 0} for name, value in metrics.items()}
    assert tracker.images == {"previews/contact sheet": sheet}
    assert "evaluation.text_image_model" in tracker.tags["not_measured"]
    assert "effect/distance.negative_word" in tracker.tags["not_measured"]  # branch_images is 0
    assert isinstance(table, pd.DataFrame)
    assert table.groupby(["kind", "group"]).size().to_dict() == {
        ("subject", BASE): 4,
        ("subject", CONCEPT): 4,
        ("prior", CONCEPT): 2,
    }
    stored = [one.entry for one in read_pictures(pictures, "evaluation_pictures")]
    assert Counter((one.kind, one.group) for one in stored) == {
        ("subject", BASE): 4,
        ("subject", CONCEPT): 4,
        ("prior", BASE): 2,
        ("prior", CONCEPT): 2,
    }
    assert isinstance(measured, pd.DataFrame)
    assert table["prompt"].iloc[0] == "a fox, blue background"
    assert "a my-fox, blue background" in set(table["prompt"])
    assert {"similarity/concept.efficientnet-lite0", "prior_drift/efficientnet-lite0"} <= set(metrics)


@pytest.fixture(scope="module")
def base_model_with_towers(tiny_base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny base model with CLIP towers beside it; they are in `clip`, too, with a tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = shutil.copytree(tiny_base_model, tmp_path_factory.mktemp("with_towers") / "base_model")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 24}
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=tower | text, vision_config=vision, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLIPModel(config)
    model.save_pretrained(folder.with_name("towers"))
    for part in (model, tokenizer):
        part.save_pretrained(folder.with_name("clip"))
    return folder


def test_towers_beside_the_base_model_score_prompts_and_colours_are_read(
    base_model_with_towers: Path, tiny_base_model: Path, zero_step_concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _, metrics, table = _evaluate(base_model_with_towers, zero_step_concept, _params(evaluators=()))
    assert 0 <= metrics["prompt/clip_score.base"] == pytest.approx(table["clip_score"][table["group"] == BASE].mean())
    assert {"prompt/background.concept", "prompt/clip_score.concept"} <= set(metrics)
    assert "evaluation.text_image_model" not in caplog.text
    values = {"text_image_model": None, "color_agreement": False}
    _, metrics, _ = _evaluate(base_model_with_towers, zero_step_concept, _params(evaluators=(), **values))
    assert not [name for name in metrics if name.startswith("prompt/")]


def test_without_a_clip_model_the_score_is_left_out_and_the_option_is_logged(
    tiny_base_model: Path, zero_step_concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _, metrics, table = _evaluate(tiny_base_model, zero_step_concept, _params(evaluators=()))
    assert "evaluation.text_image_model" in caplog.text
    assert "clip_score" not in table
    assert not [name for name in metrics if name.startswith("prompt/")]


def test_a_clip_model_named_for_the_score_is_used_with_any_base_model(
    base_model_with_towers: Path, tiny_base_model: Path, zero_step_concept: Concept
) -> None:
    named = f"clip:{base_model_with_towers.with_name('clip')}"
    _, metrics, _ = _evaluate(tiny_base_model, zero_step_concept, _params(evaluators=(), text_image_model=named))
    assert 0 <= metrics["prompt/clip_score.concept"] <= 2.5
    with pytest.raises(InputError, check=says(expected="clip", got="/no/such/folder")):
        check_evaluation(_params(text_image_model="clip:/no/such/folder"), None)


@dataclasses.dataclass
class Call:
    prompts: list[str]
    seeds: list[int]
    negative_prompt: str
    guidance_scale: float


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Replace `generate` by a stub, and return the list of its calls."""
    found: list[Call] = []

    def record(backbone, loaded, prompts, negative_prompt, seeds, sampler):
        found.append(Call(list(prompts), list(seeds), negative_prompt, sampler.guidance_scale))
        return [Image.new("RGB", (32, 32), "gray")] * len(prompts)

    monkeypatch.setattr("dreamartist_pipeline.pipelines.evaluation.drawing.generate", record)
    return found


def _changed(calls: list[Call], params: EvaluationParams) -> list[Call]:
    """Return the calls for branches and guidance, which follow those for both models."""
    usual = 2 * len([*params.prompts, *params.prior_prompts])
    return calls[usual:]


def test_images_without_a_part_of_the_negative_branch_are_drawn_from_the_first_seeds(
    tiny_base_model: Path, zero_step_concept: Concept, calls: list[Call]
) -> None:
    one_each = SamplerParams(num_inference_steps=2, batch_size=2)
    params = _params(evaluators=(), sampler=one_each, branch_images=1, negative_prompt="blurry")
    _, metrics, _ = _evaluate(tiny_base_model, zero_step_concept, params)
    adapter, word = _changed(calls, params)
    assert (adapter.seeds, word.seeds) == ([1000] * 2, [1000] * 2)
    assert (adapter.negative_prompt, word.negative_prompt) == ("blurry", "blurry, my-fox-neg")
    assert metrics["effect/distance.negative_adapter.pixels"] == 0
    calls.clear()
    _evaluate(tiny_base_model, zero_step_concept, params.model_copy(update={"negative_prompt": "blurry, {pt1}"}))
    assert calls[3].negative_prompt == "blurry, my-fox-neg"  # of the concept's first images
    assert _changed(calls, params)[1].negative_prompt == "blurry"
    calls.clear()
    weak = {"strength": StrengthParams(negative=0.0)}
    _evaluate(tiny_base_model, zero_step_concept, params.model_copy(update=weak))
    assert [call.negative_prompt for call in _changed(calls, params)] == ["blurry, my-fox-neg"]
    calls.clear()
    _evaluate(tiny_base_model, zero_step_concept, params.model_copy(update={"branch_images": 0}))
    assert not _changed(calls, params)


def test_images_at_other_guidance_scales_are_drawn_from_the_first_seeds(
    tiny_base_model: Path, zero_step_concept: Concept, calls: list[Call]
) -> None:
    sampler = SamplerParams(num_inference_steps=2, batch_size=2, guidance_scale=4.0)
    params = _params(evaluators=(), sampler=sampler, guidance_images=1, guidance_scales=(2.0, 4.0, 8.0))
    _evaluate(tiny_base_model, zero_step_concept, params)
    assert [(call.guidance_scale, call.seeds) for call in _changed(calls, params)] == [
        (2.0, [1000] * 2),
        (8.0, [1000] * 2),  # images at 4.0 are there already
    ]
    calls.clear()
    _evaluate(tiny_base_model, zero_step_concept, params.model_copy(update={"guidance_images": 0}))
    assert not _changed(calls, params)


def test_the_negative_adapter_is_off_where_its_effect_is_measured(
    tiny_base_model: Path, zero_step_concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    strengths = []
    monkeypatch.setattr(drawing, "attach", lambda *args: (strengths.append(args[2]), concepts.attach(*args))[1])
    _evaluate(tiny_base_model, zero_step_concept, _params(evaluators=(), branch_images=1))
    assert {(one.positive, one.negative) for one in strengths} == {(1, 1), (1, 0)}


def test_further_pictures_are_unseen_views_except_that_of_the_training(
    tiny_base_model: Path, zero_step_concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    def png(image: Image.Image) -> bytes:
        data = io.BytesIO()
        image.save(data, "PNG")
        return data.getvalue()

    files = {"same.png": lambda: png(_picture("white", "red")), "other.png": lambda: png(_picture("blue", "red"))}
    with caplog.at_level("INFO"):
        views = prepare_views(files, _picture("white", "red"), INGESTION)
    assert [view.getpixel((0, 0)) for view in views] == [COLORS["blue"]]
    assert "same.png" in caplog.text
    with pytest.raises(InputError, check=says(expected="bad.png of evaluation.views")):
        check_views(INGESTION, None, {"bad.png": lambda: b"no picture"})


def test_fidelity_to_unseen_views_is_measured_where_there_are_some(images: EvaluationImages) -> None:
    assert "similarity_unseen/concept.mean-color" not in measure(images, [MeanColor()]).metrics
    seen = measure(dataclasses.replace(images, views=[_picture("blue", "orange")]), [MeanColor()]).metrics
    assert seen["similarity_unseen/concept.mean-color"] == pytest.approx(seen["similarity/concept.mean-color"])


def test_further_pictures_reach_the_measures(
    tiny_base_model: Path, zero_step_concept: Concept, calls: list[Call], tmp_path: Path
) -> None:
    _picture("blue", "red").save(tmp_path / "view.png")
    params = _params(images_per_prompt=1, views=[str(tmp_path)])
    files = UserPicturesDataset(path=".", sources=list(params.views)).load()
    _, metrics, *_ = evaluate(
        str(tiny_base_model),
        zero_step_concept,
        _picture("white", "red"),
        files,
        params=params,
        ingestion=INGESTION,
        device=CPU,
        tracker=RecordingTracker(),
    )
    assert "similarity_unseen/concept.efficientnet-lite0" in metrics


def test_recognition_without_a_judge_is_refused_if_it_is_asked_for(tiny_base_model: Path) -> None:
    with pytest.raises(InputError, check=says(expected="evaluation.recognition", got="none")):
        check_recognition(_params(recognition=True), None, str(tiny_base_model))
    check_recognition(_params(), None, str(tiny_base_model))


def test_a_concept_of_no_steps_leaves_the_base_model_exactly_alone(
    tiny_base_model: Path, zero_step_concept: Concept
) -> None:
    params = _params(evaluators=())
    _, metrics, table = _evaluate(tiny_base_model, zero_step_concept, params)
    assert metrics["prior_drift/pixels"] == 0
    assert (table.query("kind == 'prior'")["drift_pixels"] == 0).all()


def test_a_concept_without_trigger_word_is_asked_for_by_its_own_class_word(tiny_base_model: Path) -> None:
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
    from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept

    group = {"lr": 1e-3, "rank": 2, "layers": [r"re:.*\.attn.?$"]}
    conditions = {"clip_skip": 1, "zero_terminal_snr": True}
    params = TrainingParams(num_steps=0, guidance_scale="1.0", class_word="sks fox", lora_unet=[group], **conditions)
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    concept = start_concept(backbone, params, 1, seed=0).snapshot(concept_metadata(backbone, params, 1))
    _, metrics, table = _evaluate(tiny_base_model, concept, _params(evaluators=()))
    assert {"a fox, blue background", "a sks fox, blue background"} <= set(table["prompt"])
    assert metrics["prior_drift/pixels"] == 0  # the base model is drawn under the concept's conditions


def test_weights_act_when_drawing_and_not_when_measuring(tiny_base_model: Path, zero_step_concept: Concept) -> None:
    asked = {"evaluators": (), "color_agreement": True}
    tables = [
        _evaluate(tiny_base_model, zero_step_concept, _params(prompts=(prompt,), **asked))[2].query("kind == 'subject'")
        for prompt in ("a red {pt1}, blue background", "a red {pt1:1.8}, {blue background:1.5}")
    ]
    plain, weighted = tables
    assert set(weighted["prompt"]) == {
        "a red {fox:1.8}, {blue background:1.5}",
        "a red {my-fox:1.8}, {blue background:1.5}",
    }
    for column in ("background_asked", "color_asked"):
        assert list(weighted[column]) == list(plain[column])
    assert list(weighted["copying_pixels"]) != list(plain["copying_pixels"])


def test_prompts_of_the_subject_without_a_trigger_word_are_named_in_one_line(
    tiny_base_model: Path, zero_step_concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    _evaluate(
        tiny_base_model, zero_step_concept, _params(prompts=("two my-foxes", "a {pt1}"), prior_prompts=("a cat",))
    )
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'two my-foxes'" in warning
    assert "a cat" not in warning


def test_strengths_by_name_are_logged_and_written_on_the_sheet(
    tiny_base_model: Path, zero_step_concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    params = _params(evaluators=(), strength="reference")
    with caplog.at_level("INFO"):
        _evaluate(tiny_base_model, zero_step_concept, params)
    assert "Adapter strengths: 0.8 positive, 0.65 negative." in caplog.messages
    assert _sampling_line(params).endswith("adapter strength 0.8 positive, 0.65 negative")


def test_a_missing_evaluator_is_refused_before_the_concept_is_drawn(
    tiny_base_model: Path, zero_step_concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, picture = _params(evaluators=("clip:/no/such/folder",)), _picture("white", "red")
    of_base = drawn(draw_base_images(str(tiny_base_model), zero_step_concept, picture, params, CPU))
    monkeypatch.setattr("dreamartist_pipeline.pipelines.evaluation.drawing.generate", pytest.fail)
    given = {"params": params, "ingestion": INGESTION, "device": CPU, "tracker": RecordingTracker()}
    with pytest.raises(InputError, check=says(expected="clip", got="/no/such/folder")):
        evaluate_concept(str(tiny_base_model), zero_step_concept, picture, of_base, {}, **given)


def test_the_pipeline_reads_and_writes_the_named_data() -> None:
    pipeline = create_pipeline(RecordingTracker())
    assert pipeline.inputs() == {
        "base_model",
        "concept",
        "concept_steps",
        "prepared_image",
        "evaluation_views",
        "params:evaluation",
        "params:ingestion",
        "params:device",
    }
    tables = {"evaluation_table", "evaluation_measures", "strengths_table"}
    sheets = {"contact_sheet", "strengths_sheet", "guidance_sheet", "attention_sheet"}
    pictures = {"evaluation_pictures", "attention_pictures"}
    metrics = {"evaluation_metrics", "evaluation_scores", "recommended_settings"}
    assert pipeline.outputs() == {*sheets, *tables, *pictures, *metrics}


def test_kedro_finds_the_parameter_models_in_the_nodes_hints() -> None:
    from kedro.validation.type_extractor import TypeExtractor

    types = TypeExtractor({"evaluation": create_pipeline(RecordingTracker())}).extract_types_from_pipelines()
    assert types == {
        "evaluation": EvaluationParams,
        "ingestion": IngestionParams,
        "device": DeviceParams,
    }


@pytest.mark.parametrize(("color", "trained_on"), [("orange", "orange"), ("blue", None)])
def test_the_picture_of_the_training_is_accepted_and_so_is_any_where_it_is_unknown(
    color: str, trained_on: str | None
) -> None:
    known = trained_on and images_sha256([("", _picture("white", trained_on))])
    check_picture(known, _picture("white", color), EvaluationParams(prompts=["a {pt1}"], prior_prompts=["a cat"]))


def test_another_picture_than_that_of_the_training_is_refused() -> None:
    trained_on, other = (images_sha256([("", _picture("white", color))]) for color in ("orange", "blue"))
    params = EvaluationParams(prompts=["a {pt1}"], prior_prompts=["a cat"])
    refused = says(expected=trained_on[:12], got=other[:12], remedy="evaluation.other_picture=true")
    with pytest.raises(InputError, check=refused):
        check_picture(trained_on, _picture("white", "blue"), params)
    check_picture(trained_on, _picture("white", "blue"), params.model_copy(update={"other_picture": True}))
