"""Write general.parquet: distinct prompts of photographs, paintings, drawings and scenes.

    python data/01_raw/prompts/make_general.py

Composed of the parts in general_parts.yml, which were written for this project. Column: prompt. Parts and prompts are in the
public domain (CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

FOLDER = Path(__file__).resolve().parent
PARTS = FOLDER / "general_parts.yml"
NUM_PROMPTS = 2400
SEED = 20251
ADJECTIVE_SHARE, MAX_DETAILS = 0.6, 2

_ARTICLE = re.compile(r"(?:a|an|the|one|two|three|four) ")
_LIGHT = re.compile(
    r"rain|fog|mist|storm|starry|moon|milky|morning|night|sunlight|cloud|shadow|shade|lights|campfire|blue sky"
)
_VIEW = re.compile(r"seen from|foreground")
_VOWEL_SOUND = re.compile(r"(?!uni|use|eu|one)[aeiou]|hour|heir|honest")


def make_table(parts: Mapping[str, Any]) -> pd.DataFrame:
    """Return a prompt for each of NUM_PROMPTS different scenes, in turn from every kind that has scenes left."""
    choices = random.Random(SEED)
    by_kind = [(kind, scenes_of(kind, choices)) for kind in parts["scenes"]]
    prompts: list[str] = []
    while len(prompts) < NUM_PROMPTS:
        for kind, scenes in by_kind:
            if scenes and len(prompts) < NUM_PROMPTS:
                prompts.append(compose(kind, *scenes.pop(), parts, choices))
    return pd.DataFrame({"prompt": choices.sample(prompts, len(prompts))})


def scenes_of(kind: Mapping[str, Any], choices: random.Random) -> list[tuple[str, str]]:
    """Return the pairs of a subject and of what it does, in random order."""
    only = kind.get("only", {})
    subjects = kind["subjects"]
    pairs = [(subject, does) for does in kind["does"] for subject in subjects if subject in only.get(does, subjects)]
    choices.shuffle(pairs)
    return pairs


def compose(kind: Mapping[str, Any], subject: str, does: str, parts: Mapping[str, Any], choices: random.Random) -> str:
    """Return the prompt of a scene in some medium, with up to MAX_DETAILS details of light, view or technique."""
    shares = {name: medium["share"] for name, medium in parts["media"].items()}
    medium = parts["media"][choices.choices(list(shares), list(shares.values()))[0]]
    adjectives = kind.get("adjectives", ()) if "adjectives" in medium["has"] else ()
    scene = f"{noun_phrase(subject, adjectives, choices)} {does}"
    lists = [medium["details"]] if "details" in medium else []
    for name, named in (("light", _LIGHT), ("view", _VIEW)):
        if name in medium["has"] and name in kind and not named.search(does):
            lists.append(parts[name][kind[name]])
    details = [choices.choice(each) for each in choices.sample(lists, choices.randint(0, min(MAX_DETAILS, len(lists))))]
    return ", ".join([choices.choice(medium["forms"]).format(scene), *details])


def noun_phrase(subject: str, adjectives: Sequence[str], choices: random.Random) -> str:
    """Return a subject with its article, and sometimes an adjective that it does not have already."""
    if _ARTICLE.match(subject):
        return subject
    if adjectives and choices.random() < ADJECTIVE_SHARE:
        adjective = choices.choice(adjectives)
        if adjective not in subject:
            subject = f"{adjective} {subject}"
    return f"{'an' if _VOWEL_SOUND.match(subject) else 'a'} {subject}"


def main() -> None:
    table = make_table(yaml.safe_load(PARTS.read_text(encoding="utf-8")))
    table.to_parquet(FOLDER / "general.parquet", index=False)
    print(f"{len(table)} prompts in {FOLDER / 'general.parquet'}")


if __name__ == "__main__":
    main()
