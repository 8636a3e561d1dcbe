"""Tables of the recognition benchmark: shares with intervals over objects, and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd
from PIL import Image

from dreamartist_pipeline.core.images import image_grid
from dreamartist_pipeline.core.intervals import bootstrap_mean
from one_shot.gallery import cut_out
from one_shot.prompts import GROUP_OF, HARD, PLAIN, Prompts
from one_shot.recognition import ALL, CLASS_WORD, CONCEPTS, FIXED, KNOWN, REAL, RECONSTRUCTED, Drawn

TOPS = (1, 5)
ROW_LABELS = {
    CONCEPTS: "concepts of the subjects, from one picture",
    KNOWN: "known objects, base model",
    CLASS_WORD: "the subjects' class words, base model (floor)",
    REAL: "real drawings of the subjects (ceiling)",
    RECONSTRUCTED: "these through the autoencoder (ceiling)",
}
GALLERY_LABELS = {FIXED: "", ALL: "all objects: "}
_SHOWN_PER_KIND = 2


@dataclass(frozen=True)
class Target:
    """Target of concepts: a factor of the share of known objects, and a minimum."""

    group: str
    top: int
    of_known: float
    at_least: float = 0.0


TARGETS = (
    Target(HARD, 1, of_known=0.7, at_least=0.30),
    Target(HARD, 5, of_known=0.7, at_least=0.60),
    Target(PLAIN, 1, of_known=0.9),
    Target(PLAIN, 5, of_known=0.95),
)


# ------------------------------------------------------------------------------------------- arithmetic


def by_object(answers: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """Return the share of pictures whose object is among the nearest 1 and 5, per row, object, gallery and `keys`."""
    right = answers.assign(**{f"top_{top}": answers["rank"] <= top for top in TOPS})
    return right.groupby(["row", "object", "gallery", *keys], sort=False)[[f"top_{top}" for top in TOPS]].mean()


def summarize(answers: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over objects of every share with its 95 % bootstrap interval over objects.

    The index is (row, gallery, group, top).
    """
    shares = by_object(answers, "group")
    lines: dict[tuple[str, str, str, int], dict[str, float]] = {}
    for (row, gallery, group), of_objects in shares.groupby(["row", "gallery", "group"], sort=False):
        for top in TOPS:
            estimate = bootstrap_mean(of_objects[f"top_{top}"].tolist())
            lines[row, gallery, group, top] = {**asdict(estimate), "objects": len(of_objects)}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis(["row", "gallery", "group", "top"])


# ------------------------------------------------------------------------------------------- tables


def summary_to_markdown(summary: pd.DataFrame) -> str:
    """Return a table with one line per row, intervals in brackets."""
    columns = [
        (gallery, group, top) for gallery in summary.index.unique("gallery") for group in (PLAIN, HARD) for top in TOPS
    ]
    titles = [f"{GALLERY_LABELS[gallery]}{group} top-{top}" for gallery, group, top in columns]
    lines = _header(["", *titles])
    for row, label in ROW_LABELS.items():
        values = [summary.loc[row, *column] for column in columns]
        cells = [f"{one['mean']:.0%} [{100 * one['low']:.0f}–{100 * one['high']:.0f}]" for one in values]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def targets_to_markdown(summary: pd.DataFrame) -> str:
    """Return a table of the targets and results in the fixed gallery."""
    lines = _header(["prompts", "concepts", "known objects", "target", "reached"])
    for target in TARGETS:
        reached, known = (
            float(summary.loc[(row, FIXED, target.group, target.top), "mean"]) for row in (CONCEPTS, KNOWN)
        )
        goal = max(target.of_known * known, target.at_least)
        rule = f"{target.of_known:g} × {known:.0%}" + (f", at least {target.at_least:.0%}" if target.at_least else "")
        verdict = "yes" if reached >= goal - 1e-9 else "no"
        lines.append(
            f"| {target.group}, top-{target.top} | {reached:.1%} | {known:.1%} | {goal:.1%} ({rule}) | {verdict} |"
        )
    return "\n".join(lines)


def objects_to_markdown(answers: pd.DataFrame) -> str:
    """Return a table of shares and confusions in the fixed gallery, by subject and known object."""
    fixed = answers[(answers["gallery"] == FIXED) & answers["row"].isin([CONCEPTS, KNOWN])]
    groups, kinds = by_object(fixed, "group"), by_object(fixed, "kind")
    hard_kinds = [kind for kind, group in GROUP_OF.items() if group == HARD]
    titles = [f"{group} top-{top}" for group in (PLAIN, HARD) for top in TOPS]
    lines = _header(["", *titles, *(f"{kind} top-1" for kind in hard_kinds), "taken for"])
    for (row, word), pictures in fixed.groupby(["row", "object"], sort=False):
        shares = [groups.loc[(row, word, FIXED, group), f"top_{top}"] for group in (PLAIN, HARD) for top in TOPS]
        shares += [kinds.loc[(row, word, FIXED, kind), "top_1"] for kind in hard_kinds]
        mistakes = pictures["nearest"][pictures["nearest"] != word].value_counts().head(3)
        taken_for = ", ".join(f"{other} ({count})" for other, count in mistakes.items())
        label = word if row == CONCEPTS else f"{word} (known)"
        lines.append(f"| {label} | {' | '.join(f'{share:.0%}' for share in shares)} | {taken_for} |")
    return "\n".join(lines)


def _header(titles: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]


# ------------------------------------------------------------------------------------------- pictures


def sheet(drawn: Sequence[Drawn], answers: pd.DataFrame, prompts: Prompts) -> Image.Image:
    """Return a grid of some cut-outs of every concept, labelled with prompt and nearest object."""
    shown = [
        index
        for kind in GROUP_OF
        for index in [place for place, other in enumerate(prompts.kinds) if other == kind][:_SHOWN_PER_KIND]
    ]
    fixed = answers[answers["gallery"] == FIXED].set_index(["row", "object", "picture"])
    images, labels = [], []
    for one in drawn:
        for index in shown:
            answer = fixed.loc[(one.row, one.word, index)]
            images.append(cut_out(one.images[index]))
            labels.append(f"{prompts.templates[index].format(one.word)}: {answer['nearest']} ({answer['rank']})")
    return image_grid(images, columns=len(shown), labels=labels)
