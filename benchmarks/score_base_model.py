"""Evaluate the base model: the share of images that match their prompt, by the judge.

    python benchmarks/score_base_model.py
    python benchmarks/score_base_model.py --base-model FOLDER --sampler ddim --steps 50

Prompts are random captions with a separate seed; attributes that a caption does not name are not scored. Images of the
same scenes, composed of real drawings, and their reconstructions by the autoencoder give upper limits.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from kedro.io import DatasetError
from PIL import Image
from tqdm.auto import tqdm

from dreamartist_pipeline.backbones.base_model import (
    Backbone,
    BaseModelFiles,
    decode_latents,
    encode_images,
    load_backbone,
)
from dreamartist_pipeline.backbones.concepts import attach, generate
from dreamartist_pipeline.core.images import image_grid, to_images, to_tensor
from dreamartist_pipeline.embedded.datasets import JudgeDataset, SpritePackagesDataset, SpriteSetDataset
from dreamartist_pipeline.embedded.judge import (
    IMAGE_PX,
    Judge,
    JudgeVocabulary,
    Verdict,
    agreement,
    attributes_in_caption,
    judge_images,
    labels_of,
)
from dreamartist_pipeline.embedded.pretraining import psnr
from dreamartist_pipeline.embedded.scenes import Scenes, Shown, TintRule, compose, draw_scenes, seen_tints, unseen_tints
from dreamartist_pipeline.embedded.sprites import SpriteSet
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, PretrainParams, SamplerParams, StrengthParams
from dreamartist_pipeline.schedulers import SHORT_SCHEDULERS
from dreamartist_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS

ROOT = Path(__file__).resolve().parents[1]
SPRITES = ROOT / "data/02_intermediate/pretrain/sprites.safetensors"
GENERATED, RECONSTRUCTED, REAL = "generated", "autoencoder's reconstruction", "real renderings"
ANY, SEEN, UNSEEN = "any", "seen", "unseen"  # groups of prompts
UNSEEN_MARGIN = 0.10  # allowed loss of unseen combinations against seen ones
_NUM_WORST_OBJECTS = 12
_NUM_WORST_CASES = 48


# ---------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompts:
    """A group of prompts with their scenes."""

    group: str
    scenes: Scenes

    @property
    def shown(self) -> tuple[Shown, ...]:
        """The labels of each prompt."""
        return self.scenes.shown


def nameable(vocabulary: JudgeVocabulary, drawn: SpriteSet | None = None) -> SpriteSet:
    """Return the sprites of a vocabulary without pixels, for drawing prompts.

    Args:
        vocabulary: of the judge.
        drawn: only these, because not every style has every object; None: every object in every style.

    Raises:
        SystemExit: no style has a drawing of an object.
    """
    if drawn is not None and (missing := sorted(set(vocabulary.objects) - set(drawn.objects))):
        raise SystemExit(f"expected drawings of all classes of the judge in {SPRITES}; got none of {missing[:5]}")
    known = None if drawn is None else set(zip(drawn.styles, drawn.objects, strict=True))
    pairs = [pair for pair in product(vocabulary.styles, vocabulary.objects) if known is None or pair in known]
    styles, objects = zip(*pairs, strict=True)
    return SpriteSet(torch.empty(0, 4, 1, 1, dtype=torch.uint8), objects, styles)


def draw_prompts(sprites: SpriteSet, num_prompts: int, num_combinations: int, seed: int) -> list[Prompts]:
    """Draw prompts of any kind, and of single objects in tints that are seen and unseen in training."""
    groups = [Prompts(ANY, draw_scenes(sprites, num_prompts, seed))]
    for group, tints_of in ((SEEN, seen_tints), (UNSEEN, unseen_tints)):
        seed += 1
        if num_combinations:
            groups.append(Prompts(group, _single_tinted(sprites, num_combinations, seed, tints_of)))
    return groups


def _single_tinted(sprites: SpriteSet, num_scenes: int, seed: int, tints_of: TintRule) -> Scenes:
    scenes = draw_scenes(sprites, 20 * num_scenes + 100, seed, tints_of=tints_of)  # about every sixth is one
    chosen = [i for i, one in enumerate(scenes.shown) if len(one.objects) == 1 and one.tints[0]][:num_scenes]
    return scenes.subset(chosen)


# ---------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """One row of the table.

    Attributes:
        label: name of the row.
        group: of prompts.
        asks: (verdict, shown) -> whether the verdict is right; None if the prompt does not name the attribute.
        target: share of right verdicts.
        within: instead of a target, (allowed loss, row to compare with).
    """

    label: str
    group: str
    asks: Callable[[Verdict, Shown], bool | None]
    target: float | None = None
    within: tuple[float, str] | None = None


def _of(attribute: str) -> Callable[[Verdict, Shown], bool | None]:
    """Score an attribute that the caption names."""

    def ask(verdict: Verdict, shown: Shown) -> bool | None:
        return agreement(verdict, shown)[attribute] if attribute in attributes_in_caption(shown) else None

    return ask


def _single(attribute: str) -> Callable[[Verdict, Shown], bool | None]:
    """Score an attribute of scenes with one object."""
    ask = _of(attribute)
    return lambda verdict, shown: ask(verdict, shown) if len(shown.objects) == 1 else None


def _pair(*layouts: str) -> Callable[[Verdict, Shown], bool | None]:
    """Score objects and positions of scenes in one of the layouts."""

    def ask(verdict: Verdict, shown: Shown) -> bool | None:
        right = agreement(verdict, shown)
        asked = [right[name] for name in ("object", "second_object", "layout")]
        return all(asked) if shown.layout in layouts else None

    return ask


def _pair_colors(verdict: Verdict, shown: Shown) -> bool | None:
    right = agreement(verdict, shown)
    asked = [right[name] for name in ("tint", "second_tint") if right[name] is not None]
    return all(asked) if len(shown.objects) == 2 and asked else None


QUESTIONS: dict[str, Question] = {
    "object": Question("object (one in the picture)", ANY, _single("object"), 0.90),
    "style": Question("style", ANY, _of("style"), 0.85),
    "background": Question("background colour, of a pattern both", ANY, _of("background"), 0.97),
    "pattern": Question("pattern", ANY, _of("pattern")),
    "color": Question("object colour (one in the picture)", ANY, _single("tint"), 0.90),
    "two_objects": Question("two objects, each in its place", ANY, _pair("beside", "stacked"), 0.70),
    "two_colors": Question("colours of two objects, each in its place", ANY, _pair_colors),
    "count": Question('two of a kind ("two cats")', ANY, _pair("twins")),
    "seen_object": Question("tinted object, combination seen in training", SEEN, _single("object")),
    "seen_color": Question("its colour", SEEN, _single("tint")),
    "unseen_object": Question(
        "tinted object, combination not seen", UNSEEN, _single("object"), within=(UNSEEN_MARGIN, "seen_object")
    ),
    "unseen_color": Question("its colour", UNSEEN, _single("tint"), within=(UNSEEN_MARGIN, "seen_color")),
}


# ---------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Pictures:
    """Images `[N, 3, H, W]` in [-1, 1] of a group of prompts by source, and their verdicts."""

    prompts: Prompts
    images: dict[str, torch.Tensor]
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)


def draw_pictures(backbone: Backbone, prompts: Prompts, first_seed: int, sampler: SamplerParams) -> torch.Tensor:
    """Generate one image per prompt with the base model, with seeds from `first_seed` on."""
    captions = list(prompts.scenes.captions)
    seeds = range(first_seed, first_seed + len(captions))
    base_model = attach(backbone, None, StrengthParams())
    with tqdm(total=len(captions), desc=f"drawing ({prompts.group})", unit="image") as bar:
        return to_tensor(generate(backbone, base_model, captions, "", seeds, sampler, progress=bar.update))


def paint_real(sprites: SpriteSet, order: SpriteSet, scenes: Scenes) -> torch.Tensor:
    """Compose the scenes from real drawings.

    Args:
        sprites: drawings with pixels.
        order: the sprites that the scenes index.
    """
    index_of = {pair: index for index, pair in enumerate(zip(sprites.objects, sprites.styles, strict=True))}
    pairs = list(zip(order.objects, order.styles, strict=True))
    images = sprites.images[[index_of[pair] for pair in pairs]]
    batches = torch.arange(len(scenes)).split(100)
    return torch.cat([compose(images, scenes.rows(batch), IMAGE_PX) for batch in batches])


def reconstruct(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode images."""
    batches = tqdm(images.split(50), desc="autoencoder", unit="batch")
    return torch.cat([decode_latents(backbone, encode_images(backbone, batch)[0]).cpu() for batch in batches])


def held_out_sprites() -> SpriteSet | None:
    """Render the held-out objects; None without the sprite packages."""
    from dreamartist_pipeline.embedded.sprites import choose_held_out_sprites, draw_sprites

    configuration = CONFIG_LOADER_CLASS(conf_source=str(ROOT / "conf"), **CONFIG_LOADER_ARGS)
    entry, recipe = configuration["catalog"]["sprite_packages"], configuration["parameters"]["pretrain"]
    params = PretrainParams.model_validate(recipe)
    try:
        packages = SpritePackagesDataset(path=str(ROOT / entry["path"]), packages=entry["packages"]).load()
        return draw_sprites(choose_held_out_sprites(packages, params), params.sprite_px)
    except (DatasetError, ImportError) as error:
        print(f"no pictures of held-out objects: {error}")
        return None


def quality_db(backbone: Backbone, sprites: SpriteSet, num_scenes: int, seed: int) -> float:
    """Return the autoencoder's mean PSNR in dB over scenes of the sprites."""
    scenes = draw_scenes(sprites, num_scenes, seed, tints_of=seen_tints)
    images = compose(sprites.images, scenes, IMAGE_PX)
    return float(psnr(reconstruct(backbone, images), images).mean())


# ---------------------------------------------------------------------------------------------- tabulating


def tabulate(pictures: Sequence[Pictures]) -> pd.DataFrame:
    """Return one row per question: number of prompts, and share of right verdicts by source."""
    by_group = {one.prompts.group: one for one in pictures}
    rows: dict[str, dict[str, Any]] = {}
    for name, question in QUESTIONS.items():
        if question.group not in by_group:
            continue
        group = by_group[question.group]
        right = {source: _answers(question, group, source) for source in group.verdicts}
        shares: dict[str, Any] = {source: sum(all_) / len(all_) for source, all_ in right.items() if all_}
        rows[name] = {"label": question.label, "asked": len(right[GENERATED]), **shares}
        rows[name]["target"] = _target(question, rows)
    return pd.DataFrame.from_dict(rows, orient="index")


def _answers(question: Question, pictures: Pictures, source: str) -> list[bool]:
    pairs = zip(pictures.verdicts[source], pictures.prompts.shown, strict=True)
    answers = (question.asks(verdict, shown) for verdict, shown in pairs)
    return [answer for answer in answers if answer is not None]


def _target(question: Question, rows: dict[str, dict[str, Any]]) -> float | None:
    if question.within is None:
        return question.target
    margin, other = question.within
    seen: float | None = rows[other].get(GENERATED)
    return None if seen is None else seen - margin


def to_markdown(table: pd.DataFrame) -> str:
    """Return the table as markdown."""
    sources = [source for source in (GENERATED, RECONSTRUCTED, REAL) if source in table]
    lines = [
        f"| asked for | prompts | {' | '.join(sources)} | target | reached |",
        "|---|" + "---:|" * (len(sources) + 3),
    ]
    for _, row in table.iterrows():
        target = row["target"]
        reached = "—" if pd.isna(target) or pd.isna(row[GENERATED]) else "yes" if row[GENERATED] >= target else "no"
        cells = [_percent(row[source]) for source in sources]
        lines.append(f"| {row['label']} | {row['asked']} | {' | '.join(cells)} | {_percent(target)} | {reached} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "—" if share is None or pd.isna(share) else f"{share:.1%}"


def by_object(pictures: Pictures) -> pd.DataFrame:
    """Return one row per object, over scenes with one object: share of right verdicts, and confusions."""
    ask = QUESTIONS["object"].asks
    right: dict[str, dict[str, list[bool]]] = {}
    taken_for: dict[str, Counter[str]] = {}
    for source, verdicts in pictures.verdicts.items():
        for verdict, shown in zip(verdicts, pictures.prompts.shown, strict=True):
            answer, word = ask(verdict, shown), shown.objects[0]
            if answer is None:
                continue
            right.setdefault(word, {}).setdefault(source, []).append(answer)
            mistakes = taken_for.setdefault(word, Counter())
            if source == GENERATED and not answer:
                mistakes[verdict.first_object] += 1
    rows = {
        word: {
            "prompts": len(shares[GENERATED]),
            **{source: sum(answers) / len(answers) for source, answers in shares.items()},
            "taken for": ", ".join(f"{other} ({count})" for other, count in taken_for[word].most_common(3)),
        }
        for word, shares in right.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("object").reset_index()
    return table.sort_values([GENERATED, "prompts", "object"], ascending=[True, False, True], ignore_index=True)


def objects_to_markdown(table: pd.DataFrame) -> str:
    """Return the per-object table as markdown."""
    sources = [source for source in (GENERATED, RECONSTRUCTED, REAL) if source in table]
    lines = [
        f"| object | prompts | {' | '.join(sources)} | taken for |",
        "|---|" + "---:|" * (len(sources) + 1) + "---|",
    ]
    for _, row in table.iterrows():
        cells = [_percent(row[source]) for source in sources]
        lines.append(f"| {row['object']} | {row['prompts']} | {' | '.join(cells)} | {row['taken for']} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- worst cases


def wrong_words(verdict: Verdict, shown: Shown) -> list[str]:
    """Return the wrong predictions of the judge for attributes that the caption names."""
    right, named, labels = agreement(verdict, shown), attributes_in_caption(shown), labels_of(shown)
    heads = {
        "object": "first_object",
        "second_object": "second_object",
        "style": "style",
        "background": "background" if labels["background"] != verdict.background else "second_color",
        "pattern": "pattern",
        "tint": "first_tint",
        "second_tint": "second_tint",
        "layout": "layout",
    }
    return [str(getattr(verdict, head)) for name, head in heads.items() if name in named and right[name] is False]


def worst_cases(pictures: Sequence[Pictures], num_cases: int) -> Image.Image | None:
    """Return a grid of the generated images with the most errors, labelled with prompt and predictions."""
    cases: list[tuple[int, str, torch.Tensor]] = []
    for group in pictures:
        rows = zip(group.prompts.shown, group.verdicts[GENERATED], group.images[GENERATED], strict=True)
        for shown, verdict, image in rows:
            if words := wrong_words(verdict, shown):
                cases.append((len(words), f"{shown.caption} (judged: {', '.join(words)})", image))
    worst = sorted(cases, key=lambda case: -case[0])[:num_cases]
    if not worst:
        return None
    images = to_images(torch.stack([image for _, _, image in worst]))
    return image_grid(images, columns=8, labels=[label for _, label, _ in worst])


# ---------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate and judge images, print and write the report."""
    options = _parse(arguments)
    try:
        judge = JudgeDataset(filepath=str(options.judge)).load()
        backbone = load_backbone(BaseModelFiles(options.base_model), DeviceParams(device=options.device))
    except (DatasetError, InputError) as error:
        raise SystemExit(str(error)) from error
    if backbone.image_px != IMAGE_PX:
        raise SystemExit(f"expected a base model of {IMAGE_PX} px, which the judge knows; got {backbone.image_px} px")
    sprites = SpriteSetDataset(filepath=str(SPRITES)).load() if SPRITES.is_file() else None
    if sprites is None:
        print(f"no {SPRITES.relative_to(ROOT)}: the table has generated images only; run `make sprites` for the others")
    order = nameable(judge.vocabulary, sprites)
    groups = draw_prompts(order, options.num_prompts, options.num_combinations, options.seed)
    sampler = SamplerParams(
        scheduler=options.sampler,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        batch_size=options.batch_size,
    )
    introduction = _introduction(options, backbone)
    _write(options.output, make_pictures(backbone, judge, sprites, order, groups, sampler), introduction)


def make_pictures(
    backbone: Backbone,
    judge: Judge,
    sprites: SpriteSet | None,
    order: SpriteSet,
    groups: Sequence[Prompts],
    sampler: SamplerParams,
) -> list[Pictures]:
    """Return judged images of every group, from every available source: real ones need drawings with pixels."""
    pictures: list[Pictures] = []
    first_seed = 0
    for group in groups:
        images = {GENERATED: draw_pictures(backbone, group, first_seed, sampler)}
        first_seed += len(group.scenes)
        if sprites is not None:
            real = paint_real(sprites, order, group.scenes)
            images |= {RECONSTRUCTED: reconstruct(backbone, real), REAL: real}
        verdicts = {source: judge_images(judge, batch) for source, batch in images.items()}
        pictures.append(Pictures(group, images, verdicts))
    return pictures


def _introduction(options: argparse.Namespace, backbone: Backbone) -> str:
    lines = [
        f"Base model {backbone.name} ({backbone.fingerprint}), {options.sampler}, {options.steps} steps, "
        f"guidance {options.guidance_scale:g}, {options.num_prompts} prompts drawn with seed {options.seed}; "
        "share of images whose prediction by the judge matches the prompt."
    ]
    if (sprites := held_out_sprites()) is not None:
        quality = quality_db(backbone, sprites, options.num_combinations or 200, options.seed + 3)
        lines.append(
            f"The autoencoder reconstructs scenes of {len(set(sprites.objects))} held-out objects at {quality:.2f} dB."
        )
    return "\n".join(lines)


def _write(folder: Path, pictures: Sequence[Pictures], introduction: str) -> None:
    table, objects = tabulate(pictures), by_object(pictures[0])
    report = (
        f"{introduction}\n\n{to_markdown(table)}\n\nThe objects that fail most often:\n\n"
        f"{objects_to_markdown(objects.head(_NUM_WORST_OBJECTS))}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.md").write_text(report, encoding="utf-8")
    table.to_csv(folder / "scores.csv", index_label="question")
    objects.to_csv(folder / "objects.csv", index=False)
    if (sheet := worst_cases(pictures, _NUM_WORST_CASES)) is not None:
        sheet.save(folder / "worst_cases.png")
    print(f"\n{report}\nwritten to {folder}: scores.md, scores.csv, objects.csv, worst_cases.png")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", type=Path, default=ROOT / "data/01_raw/base_model")
    parser.add_argument("--judge", type=Path, default=ROOT / "data/01_raw/judge/judge.safetensors")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--num-combinations", type=int, default=200, help="seen ones, and as many unseen ones")
    parser.add_argument("--seed", type=int, default=2_000_000, help="of the prompts; not used in any training")
    parser.add_argument("--sampler", choices=SHORT_SCHEDULERS, default="dpmsolver++")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "data/08_reporting/base_model_scores")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
