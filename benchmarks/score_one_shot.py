"""Evaluate one-shot training: recognition of the subject, and adherence to the rest of the prompt.

    python benchmarks/score_one_shot.py
    python benchmarks/score_one_shot.py --subjects development --workers 2
    python benchmarks/score_one_shot.py --subjects development --base-model FOLDER --no-judge --fixed-gallery

Each subject is trained from its bundled picture (`kedro run`; earlier runs are reused). Recognition: an independent
network ranks the subject among drawings of many objects. Adherence: base model and concepts draw the same prompts from
the same seeds, the concept with its trigger word in place of the object, and the judge evaluates background and object
colour.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from kedro.io import DatasetError
from PIL import Image
from tqdm.auto import tqdm

from compare_methods import ROOT, concepts
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, generate
from dreamartist_pipeline.backbones.evaluators import load_evaluator
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.images import image_grid, to_tensor
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.embedded.datasets import JudgeDataset
from dreamartist_pipeline.embedded.judge import Judge, agreement, attributes_in_caption, judge_images
from dreamartist_pipeline.embedded.scenes import Shown, draw_scenes
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams
from one_shot.prompts import Prompts, draw_prompts, fill
from one_shot.recognition import (
    ALL,
    CLASS_WORD,
    CONCEPTS,
    FIXED,
    KNOWN,
    KNOWN_OBJECTS,
    Drawn,
    answers,
    build_galleries,
    draw_ceilings,
)
from one_shot.report import objects_to_markdown, sheet, summarize, summary_to_markdown, targets_to_markdown
from one_shot.world import World, load_world
from score_base_model import nameable, reconstruct

HELD_OUT_STYLE = "mushroom-outline"  # a subject in a style that is not in the training data
GROUPS = {  # of subjects: choices are made on the first, results reported on the second
    "development": ("guitar", "sailboat", "pineapple", "cupcake", "teapot"),
    "reporting": (
        *("fox", "octopus", "strawberry", "owl", "robot", "rocket", "mushroom", "penguin", "snail", "umbrella"),
        HELD_OUT_STYLE,
    ),
}
EVALUATOR = "efficientnet-lite0"
BASE = "base model"
TOLERANCE = 0.10 + 1e-9  # allowed loss of a concept against the base model
COLUMNS = {"background": "background", "tint": "object colour"}
SHOWN_PROMPTS = 7  # images of each subject in the overview


# ------------------------------------------------------------------------------------------- adherence


@dataclass(frozen=True)
class Task:
    """One prompt, with a known object for the base model, and as a template with `{}` for concepts."""

    shown: Shown
    template: str


def draw_tasks(judge: Judge, num_prompts: int, seed: int) -> list[Task]:
    """Draw prompts with one object, and a background or a colour."""
    scenes = draw_scenes(nameable(judge.vocabulary), 4 * num_prompts + 50, seed)
    single = [shown for shown in scenes.shown if len(shown.objects) == 1 and asked(shown)]
    return [Task(shown, as_template(shown)) for shown in single[:num_prompts]]


def as_template(shown: Shown) -> str:
    """Return a caption with `{}` in place of its object."""
    word = shown.objects[0]
    return shown.caption.replace(f"an {word}", "a {}").replace(word, "{}")


def asked(shown: Shown) -> list[str]:
    """Return the columns that a caption has a value for."""
    named = attributes_in_caption(shown)
    return [name for name in COLUMNS if name in named and (name != "tint" or shown.tints[0])]


def score(judge: Judge, images: Sequence[Image.Image], tasks: Sequence[Task]) -> dict[str, float]:
    """Return the share of images that are right, by column."""
    verdicts = judge_images(judge, to_tensor(images))
    answers: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    for verdict, task in zip(verdicts, tasks, strict=True):
        right = agreement(verdict, task.shown)
        for name in asked(task.shown):
            answers[name].append(bool(right[name]))
    return {name: sum(given) / len(given) for name, given in answers.items() if given}


def draw(
    backbone: Backbone, concept: Concept | None, prompts: Sequence[str], sampler: SamplerParams
) -> list[Image.Image]:
    """Draw every prompt once, with seeds from 0 on; a concept's word fills `{}`."""
    loaded = attach(backbone, concept, StrengthParams())
    label = BASE
    if concept is not None:
        trigger_words = [positive for positive, _ in loaded.trigger_words.values()]
        label = trigger_words[0] if trigger_words else concept.metadata["class_word"]
        prompts = fill(prompts, label)
    with tqdm(total=len(prompts), desc=label, unit="image") as bar:
        return generate(backbone, loaded, prompts, "", range(len(prompts)), sampler, progress=bar.update)


def tabulate(rows: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Return the rows, with the mean of the subjects as last one."""
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    table.loc["mean of the subjects"] = table.drop(index=BASE).mean()
    return table


def to_markdown(table: pd.DataFrame) -> str:
    """Return the table as markdown, with differences to the base model in points in brackets."""
    lines = [
        f"| | {' | '.join(f'{name} as asked' for name in COLUMNS.values())} | within 10 points |",
        "|---|---:|---:|---|",
    ]
    for name, values in table.iterrows():
        gaps = values - table.loc[BASE]
        cells = [f"{values[c]:.0%}" + ("" if name == BASE else f" ({100 * gaps[c]:+.0f})") for c in COLUMNS]
        verdict = "" if name == BASE else "yes" if (gaps >= -TOLERANCE).all() else "no"
        lines.append(f"| {name} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def overview(
    references: Sequence[Image.Image], drawn: Sequence[Sequence[Image.Image]], tasks: Sequence[Task]
) -> Image.Image:
    """Return a grid with one row per subject: reference picture and images, labelled with prompts."""
    images, labels = [], []
    for reference, row in zip(references, drawn, strict=True):
        images += [reference.convert("RGB").resize(row[0].size, Image.Resampling.LANCZOS), *row[:SHOWN_PROMPTS]]
        labels += ["reference picture", *(task.template.format("…") for task in tasks[:SHOWN_PROMPTS])]
    return image_grid(images, columns=1 + SHOWN_PROMPTS, labels=labels)


def score_adherence(
    backbone: Backbone, judge: Judge, concepts: dict[str, Concept], options: argparse.Namespace, sampler: SamplerParams
) -> str:
    """Draw and judge images, write table and overview, and return the report."""
    tasks = draw_tasks(judge, options.num_prompts, options.seed)
    rows = {BASE: score(judge, draw(backbone, None, [task.shown.caption for task in tasks], sampler), tasks)}
    drawn = []
    for subject, concept in concepts.items():
        drawn.append(draw(backbone, concept, [task.template for task in tasks], sampler))
        rows[subject] = score(judge, drawn[-1], tasks)
    table = tabulate(rows)
    table.to_csv(options.output / "one_shot.csv", index_label="subject")
    references = [Image.open(options.images / f"{subject}.png") for subject in concepts]
    overview(references, drawn, tasks).save(options.output / "one_shot.png")
    return (
        f"Prompt adherence, by the judge: {len(tasks)} prompts, the same seeds in every row; difference to the base "
        f"model in points in brackets.\n\n{to_markdown(table)}"
    )


# ------------------------------------------------------------------------------------------- recognition


def score_recognition(
    backbone: Backbone, world: World, concepts: dict[str, Concept], options: argparse.Namespace, sampler: SamplerParams
) -> str:
    """Draw and recognise images, write tables and cut-outs, and return the report."""
    prompts = draw_prompts(options.recognition_prompts, options.seed)
    of_concepts, others = draw_rows(backbone, world, concepts, prompts, sampler)
    evaluator = load_evaluator(EVALUATOR, backbone.device)
    galleries = build_galleries(world, options.galleries, backbone.image_px, evaluator)
    every = pd.concat([answers(one, prompts, galleries, evaluator) for one in (*of_concepts, *others)])
    summary = summarize(every)
    every.to_csv(options.output / "recognition_pictures.csv", index=False)
    summary.to_csv(options.output / "recognition.csv")
    sheet(of_concepts, every, prompts).save(options.output / "recognition.png")
    return (
        f"Recognition, by {EVALUATOR}: {len(prompts)} prompts, the same seeds in every row, among {len(world.fixed)} "
        f"objects; in brackets 95 % intervals over {len(of_concepts)} subjects or {len(KNOWN_OBJECTS)} known objects."
        f"\n\n{summary_to_markdown(summary)}\n\n{targets_to_markdown(summary)}\n\n{objects_to_markdown(every)}"
    )


def draw_rows(
    backbone: Backbone, world: World, concepts: dict[str, Concept], prompts: Prompts, sampler: SamplerParams
) -> tuple[list[Drawn], list[Drawn]]:
    """Return images of the concepts; and images of known objects, of class words, and of the upper limits."""
    by_concepts, by_words = [], []
    for subject, style in world.references.items():
        pictures = draw(backbone, concepts[subject], prompts.templates, sampler)
        by_concepts.append(Drawn(CONCEPTS, subject, style, pictures))
        pictures = draw(backbone, None, fill(prompts.templates, subject), sampler)
        by_words.append(Drawn(CLASS_WORD, subject, style, pictures))
    for word, style in KNOWN_OBJECTS.items():
        by_words.append(Drawn(KNOWN, word, style, draw(backbone, None, fill(prompts.templates, word), sampler)))
    ceilings = draw_ceilings(world, prompts, backbone.image_px, partial(reconstruct, backbone))
    return by_concepts, [*by_words, *ceilings]


# ------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train missing concepts, score them, print and write the report."""
    options = _parse(arguments)
    world = load_world(ROOT, options.images, options.subjects) if options.recognition else None
    judge = _load_judge(options.judge) if options.use_judge else None
    pictures = [options.images / f"{subject}.png" for subject in options.subjects]
    if missing := [str(picture) for picture in pictures if not picture.is_file()]:
        raise SystemExit(f"expected a picture of every subject; got none at {', '.join(missing)}")
    params = {"images": str(options.images), "workers": options.workers}
    further = [f"base_model={options.base_model.resolve()}", *options.params]
    files = concepts(options.subjects, options.method, params, further)
    backbone = load_backbone(BaseModelFiles(options.base_model), DeviceParams())
    sampler = SamplerParams(batch_size=30)
    of_subjects = {
        subject: ConceptDataset(filepath=str(file)).load()
        for subject, file in zip(options.subjects, files, strict=True)
    }
    options.output.mkdir(parents=True, exist_ok=True)
    parts = [f"Base model {backbone.name} ({backbone.fingerprint}), method {options.method}."]
    if judge is not None:
        parts.append(score_adherence(backbone, judge, of_subjects, options, sampler))
    if world is not None:
        parts.append(score_recognition(backbone, world, of_subjects, options, sampler))
    report = "\n\n".join(parts) + "\n"
    (options.output / "one_shot.md").write_text(report, encoding="utf-8")
    print(f"\n{report}\nwritten to {options.output}")


def _load_judge(file: Path) -> Judge:
    try:
        return JudgeDataset(filepath=str(file)).load()
    except DatasetError as error:
        raise SystemExit(str(error)) from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--subjects", nargs="+", default=["reporting"], help=f"names of pictures, or groups: {', '.join(GROUPS)}"
    )
    parser.add_argument("--method", default="dreamartist-plus-plus", help="of conf/base/parameters_compare.yml")
    parser.add_argument("--images", type=Path, default=ROOT / "data/01_raw/reference_images")
    parser.add_argument("--base-model", type=Path, default=ROOT / "data/01_raw/base_model")
    parser.add_argument("--params", nargs="*", default=[], metavar="KEY=VALUE", help="further parameters of every run")
    parser.add_argument("--judge", type=Path, default=ROOT / "data/01_raw/judge/judge.safetensors")
    parser.add_argument("--no-judge", dest="use_judge", action="store_false", help="recognition only")
    parser.add_argument("--num-prompts", type=int, default=90, help="per subject, for the judge")
    parser.add_argument("--no-recognition", dest="recognition", action="store_false", help="adherence only")
    parser.add_argument(
        "--recognition-prompts", type=int, default=8, help="of each hard kind; twice as many plain ones"
    )
    parser.add_argument(
        "--fixed-gallery",
        dest="galleries",
        action="store_const",
        const=(FIXED,),
        default=(FIXED, ALL),
        help="only the fixed gallery, which is minutes faster",
    )
    parser.add_argument("--seed", type=int, default=3_000_000, help="of the prompts")
    parser.add_argument("--workers", type=int, default=1, help="parallel trainings; set OMP_NUM_THREADS=1 too")
    parser.add_argument("--output", type=Path, default=ROOT / "data/08_reporting/one_shot")
    options = parser.parse_args(arguments)
    if not (options.use_judge or options.recognition):
        parser.error("--no-judge and --no-recognition leave nothing to score; give one of them")
    options.images = options.images.resolve()
    options.subjects = [name for one in options.subjects for name in GROUPS.get(one, (one,))]
    return options


if __name__ == "__main__":
    main()
