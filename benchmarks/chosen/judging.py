"""Judge the kept steps of a training, on other prompts and seeds than those of its scores."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch
from PIL import Image

from dreamartist_pipeline.api import open_base_model, read_concept
from dreamartist_pipeline.backbones.concepts import attach
from dreamartist_pipeline.backbones.evaluators import Evaluator, load_evaluator
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.images import to_images, to_tensor
from dreamartist_pipeline.core.measures import SIMILARITY, SubjectMeasures
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.params import DeviceParams, StrengthParams, TrainingParams
from dreamartist_pipeline.pipelines.training.scoring import ImageMeasures, Judges, base_images, images_of
from dreamartist_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS
from dreamartist_pipeline.whole_files import written_whole
from score_base_model import reconstruct
from speed.report import ROOT

TOWERS, OTHER = "towers", "efficientnet-lite0"  # that chose the step, and one that did not
PROMPTS = (
    "a {pt1}, blue background",
    "a {pt1}, yellow background",
    "a {pt1}, green background",
    "a {pt1}, orange background",
    "a {pt1}, teal background",
    "a {pt1}, red background",
    "a small {pt1}, blue background",
    "a {pt1}, flat style, yellow background",
)
PRIOR_PROMPTS = (
    "a red butterfly, noto style, blue background",
    "two cats, flat style, green background",
    "a dog, orange background",
    "a small cactus, blob style, teal background",
    "a car, blue background",
    "a horse, yellow background",
    "a flower, green background",
    "a house, teal background",
)
_FIRST_SEED = 700_000  # far from those of the scores
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Judging:
    """How steps are judged: twice, on images of different seeds, so that the best of one half is compared on the other.

    Attributes:
        device: where images are drawn.
        seeds_per_half: of each prompt.
        num_prompts: with the subject, and as many without it.
        num_inference_steps: of each image.
        env: of the configuration.
    """

    device: str = "cpu"
    seeds_per_half: int = 4
    num_prompts: int = len(PROMPTS)
    num_inference_steps: int = 20
    env: str = "local"

    @property
    def num_images(self) -> int:
        """Images of the subject per kept step."""
        return 2 * self.num_prompts * self.seeds_per_half

    def params(self, subject: str, half: int) -> TrainingParams:
        """Return the parameters of a training, with these prompts and seeds in place of those of its scores."""
        params = configured(subject, self.env)
        sampler = {"num_inference_steps": self.num_inference_steps, "batch_size": _BATCH}
        judged = {
            "prompts": PROMPTS[: self.num_prompts],
            "prior_prompts": PRIOR_PROMPTS[: self.num_prompts],
            "images_per_prompt": self.seeds_per_half,
            "seed": _FIRST_SEED + half * self.seeds_per_half,
            "sampler": params.scoring.sampler.model_copy(update=sampler),
        }
        return params.model_copy(update={"scoring": params.scoring.model_copy(update=judged)})


JUDGED = Judging()


def configured(subject: str, env: str) -> TrainingParams:
    """Return the parameters of a subject's training in conf/."""
    given = {"subject": subject, "class_word": subject}
    conf = CONFIG_LOADER_CLASS(conf_source=str(ROOT / "conf"), env=env, runtime_params=given, **CONFIG_LOADER_ARGS)
    return TrainingParams.model_validate(conf["parameters"]["training"])


@dataclasses.dataclass(frozen=True)
class _Half:
    """One half of the images: its parameters, and image towers and measures by the name of the tower."""

    params: TrainingParams
    towers: dict[str, Evaluator]
    measures: dict[str, ImageMeasures]

    @classmethod
    def of(cls, judging: Judging, subject: str, half: int, backbone: Backbone, reference: Image.Image) -> _Half:
        params = judging.params(subject, half)
        location = ModelLocation(str(ROOT / "data/01_raw/base_model"))
        judges = Judges.load(location, params.scoring, backbone.device)
        towers = {TOWERS: judges.images, OTHER: load_evaluator(OTHER, backbone.device)}
        base = base_images(backbone, params, reference.size)
        measures = {
            name: ImageMeasures(dataclasses.replace(judges, images=tower), reference, params, base)
            for name, tower in towers.items()
        }
        return cls(params, towers, measures)


def judge_steps(name: str, subject: str, steps: Path, folder: Path, judging: Judging) -> None:
    """Judge all kept steps of a training that are not judged yet, and write `<step>.json` and `limits.json`.

    Args:
        name: of the run.
        subject: the class word.
        steps: folder of the concepts.
        folder: of the results.
        judging: how.
    """
    torch.set_num_threads(1)
    files = {int(file.stem): file for file in steps.glob("*.safetensors")}
    settings = json.dumps(dataclasses.asdict(judging))
    missing = [step for step in sorted(files) if not _is_judged(folder / f"{step}.json", files[step], settings)]
    if not missing and (folder / "limits.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    backbone = open_base_model(ROOT / "data/01_raw/base_model", DeviceParams(device=judging.device))
    reference = Image.open(ROOT / "data/02_intermediate" / name / "prepared_image.png").convert("RGB")
    halves = [_Half.of(judging, subject, half, backbone, reference) for half in range(2)]
    _write(folder / "limits.json", {"floor": _floor(halves), "ceiling": _ceiling(halves[0], backbone, reference)})
    for step in missing:
        loaded = attach(backbone, read_concept(files[step]), StrengthParams())
        found: dict[str, list[dict[str, float]]] = {TOWERS: [], OTHER: []}
        for half in halves:
            images = images_of(loaded.backbone, loaded, half.params, loaded.trigger_words, reference.size)
            for tower, measure in half.measures.items():
                values = measure(step, images, (math.nan, None)).values()
                found[tower].append({key: value for key, value in values.items() if key != "loss_reference"})
        _write(folder / f"{step}.json", {"halves": found, "settings": settings, "concept": files[step].stat().st_mtime})


def _floor(halves: list[_Half]) -> dict[str, dict[str, float]]:
    """Return image tower -> what the base model reaches with the class word, by name."""
    return {
        tower: {
            key: sum(half.measures[tower].floor[key] for half in halves) / len(halves)
            for key in halves[0].measures[tower].floor
        }
        for tower in (TOWERS, OTHER)
    }


def _ceiling(half: _Half, backbone: Backbone, reference: Image.Image) -> dict[str, float]:
    """Return image tower -> fidelity of the reference, encoded and decoded by the autoencoder."""
    (picture,) = to_images(reconstruct(backbone, to_tensor([reference])))
    ceilings = {}
    for name, tower in half.towers.items():
        subject = SubjectMeasures.of(tower, reference)
        ceilings[name] = float(subject.fidelity(subject.embed([picture]))[SIMILARITY.name])
    return ceilings


def _is_judged(file: Path, concept: Path, settings: str) -> bool:
    if not file.is_file():
        return False
    judged = json.loads(file.read_text(encoding="utf-8"))
    return bool(judged["settings"] == settings and judged["concept"] == concept.stat().st_mtime)


def _write(file: Path, content: object) -> None:
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
