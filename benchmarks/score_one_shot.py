"""Score one-shot training: does the prompt still decide about everything but the subject? Print one table.

    python benchmarks/score_one_shot.py
    python benchmarks/score_one_shot.py --subjects owl robot --workers 2

Each subject is trained from its one bundled picture (`kedro run`; a run that is already there is read). Then the base
model and every concept draw the same prompts from the same seeds, the concept with its trigger word where the base
model's prompt names an object, and the judge says whether background and object colour came as asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from compare_methods import ROOT, SUBJECTS, Run, run_all
from dreamartist_pipeline.backbones.base_model import Backbone, BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, generate
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.images import image_grid, to_tensor
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.embedded.datasets import JudgeDataset
from dreamartist_pipeline.embedded.judge import Judge, agreement, judge_images, said_in_caption
from dreamartist_pipeline.embedded.scenes import Shown, draw_scenes
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams
from score_base_model import nameable

HELD_OUT_STYLE = "mushroom-outline"  # a subject drawn in the style that the base model never saw
BASE = "base model"
TOLERANCE = 0.10 + 1e-9  # how far a concept may fall behind the base model; rounding aside
COLUMNS = {"background": "background", "tint": "object colour"}
SHOWN_PROMPTS = 7  # pictures of each subject in the overview


@dataclass(frozen=True)
class Task:
    """One prompt in two wordings: for the base model with an object it knows, for a concept with `{}` instead."""

    shown: Shown
    template: str


def draw_tasks(judge: Judge, num_prompts: int, seed: int) -> list[Task]:
    """Draw prompts with one object, every one of which says a background or a colour."""
    scenes = draw_scenes(nameable(judge.vocabulary), 4 * num_prompts + 50, seed)
    single = [shown for shown in scenes.shown if len(shown.objects) == 1 and asked(shown)]
    return [Task(shown, as_template(shown)) for shown in single[:num_prompts]]


def as_template(shown: Shown) -> str:
    """Return a caption with `{}` in the place of its object."""
    word = shown.objects[0]
    return shown.caption.replace(f"an {word}", "a {}").replace(word, "{}")


def asked(shown: Shown) -> list[str]:
    """Return which of the columns a caption asks for."""
    said = said_in_caption(shown)
    return [name for name in COLUMNS if name in said and (name != "tint" or shown.tints[0])]


def score(judge: Judge, images: Sequence[Image.Image], tasks: Sequence[Task]) -> dict[str, float]:
    """Return the share of pictures that show what was asked for, by column."""
    verdicts = judge_images(judge, to_tensor(images))
    answers: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    for verdict, task in zip(verdicts, tasks, strict=True):
        right = agreement(verdict, task.shown)
        for name in asked(task.shown):
            answers[name].append(bool(right[name]))
    return {name: sum(given) / len(given) for name, given in answers.items() if given}


def draw(
    backbone: Backbone, concept: Concept | None, tasks: Sequence[Task], sampler: SamplerParams
) -> list[Image.Image]:
    """Draw every task once; the seeds count up from 0."""
    loaded = attach(backbone, concept, StrengthParams())
    words = [positive for positive, _ in loaded.trigger_words.values()]
    prompts = [task.template.format(words[0]) if words else task.shown.caption for task in tasks]
    with tqdm(total=len(tasks), desc=words[0] if words else BASE, unit="image") as bar:
        return generate(backbone, loaded, prompts, "", range(len(tasks)), sampler, progress=bar.update)


def tabulate(rows: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Return one row per subject, their mean, and the base model first."""
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    table.loc["mean of the subjects"] = table.drop(index=BASE).mean()
    return table


def to_markdown(table: pd.DataFrame) -> str:
    """Return the table for people; in brackets the difference to the base model in points."""
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
    """Lay out one row per subject: its one picture, then what was drawn; the prompts stand under each picture."""
    images, labels = [], []
    for reference, row in zip(references, drawn, strict=True):
        images += [reference.convert("RGB").resize(row[0].size, Image.Resampling.LANCZOS), *row[:SHOWN_PROMPTS]]
        labels += ["the one picture", *(task.template.format("…") for task in tasks[:SHOWN_PROMPTS])]
    return image_grid(images, columns=1 + SHOWN_PROMPTS, labels=labels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, draw, judge, print and write."""
    options = _parse(arguments)
    judge = JudgeDataset(filepath=str(options.judge)).load()
    runs = [
        Run(
            subject,
            options.method,
            options.images.resolve() / f"{subject}.png",
            options.base_model.resolve(),
            (),
            "local",
        )
        for subject in options.subjects
    ]
    if missing := [str(run.image) for run in runs if not run.image.is_file()]:
        raise SystemExit(f"expected a picture of every subject; there is none at {', '.join(missing)}")
    run_all(runs, options.workers)
    backbone = load_backbone(BaseModelFiles(options.base_model), DeviceParams())
    sampler = SamplerParams(batch_size=30)
    tasks = draw_tasks(judge, options.num_prompts, options.seed)
    rows, drawn = {BASE: score(judge, draw(backbone, None, tasks, sampler), tasks)}, []
    for run in runs:
        concept = ConceptDataset(filepath=str(ROOT / "data/06_models" / run.name / "concept.safetensors")).load()
        drawn.append(draw(backbone, concept, tasks, sampler))
        rows[run.subject] = score(judge, drawn[-1], tasks)
    table = tabulate(rows)
    report = (
        f"{len(tasks)} prompts, the same seeds in every row, method {options.method}; in brackets the difference to "
        f"the base model in points.\n\n{to_markdown(table)}\n"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "one_shot.md").write_text(report, encoding="utf-8")
    table.to_csv(options.output / "one_shot.csv", index_label="subject")
    overview([Image.open(run.image) for run in runs], drawn, tasks).save(options.output / "one_shot.png")
    print(f"\n{report}\nwritten to {options.output}: one_shot.md, one_shot.csv, one_shot.png")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=[*SUBJECTS, HELD_OUT_STYLE])
    parser.add_argument("--method", default="dreamartist-plus-plus", help="of conf/base/parameters_training.yml")
    parser.add_argument("--images", type=Path, default=ROOT / "data/01_raw/reference_images")
    parser.add_argument("--base-model", type=Path, default=ROOT / "data/01_raw/base_model")
    parser.add_argument("--judge", type=Path, default=ROOT / "data/01_raw/judge/judge.safetensors")
    parser.add_argument("--num-prompts", type=int, default=90, help="per subject")
    parser.add_argument("--seed", type=int, default=3_000_000, help="of the prompts")
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side; set OMP_NUM_THREADS=1 with it")
    parser.add_argument("--output", type=Path, default=ROOT / "data/08_reporting/one_shot")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
