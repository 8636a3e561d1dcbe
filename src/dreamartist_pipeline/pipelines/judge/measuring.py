"""The judge's accuracy and confusions on labelled scenes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dreamartist_pipeline.embedded.judge import ATTRIBUTES, Verdict, agreement, labels_of
from dreamartist_pipeline.embedded.scenes import Shown

_NUM_CONFUSIONS = 12
_CONFUSABLE = ("first_object", "style", "background", "pattern", "first_tint", "layout")


def accuracy_report(verdicts: Sequence[Verdict], shown: Sequence[Shown]) -> dict[str, Any]:
    """Return accuracies by attribute and group of scenes, and the most frequent confusions.

    Groups are all scenes, and scenes by their number of objects and by tint. A group has no entry for an attribute that
    none of its scenes asks for.
    """
    pairs = list(zip(verdicts, shown, strict=True))
    groups = {
        "all": pairs,
        "one_object": [pair for pair in pairs if len(pair[1].objects) == 1],
        "two_objects": [pair for pair in pairs if len(pair[1].objects) == 2],
        "own_colors": [pair for pair in pairs if not any(pair[1].tints)],
        "tinted": [pair for pair in pairs if any(pair[1].tints)],
    }
    return {
        "num_scenes": {name: len(group) for name, group in groups.items()},
        "accuracy": {name: _shares(group) for name, group in groups.items()},
        "confusions": {head: _confusions(head, pairs) for head in _CONFUSABLE},
    }


def _shares(pairs: Sequence[tuple[Verdict, Shown]]) -> dict[str, float]:
    answers = [agreement(verdict, shown) for verdict, shown in pairs]
    asked = {name: [one[name] for one in answers if one[name] is not None] for name in ATTRIBUTES}
    return {name: sum(map(bool, right)) / len(right) for name, right in asked.items() if right}


def _confusions(head: str, pairs: Sequence[tuple[Verdict, Shown]]) -> list[dict[str, Any]]:
    """Return the wrong answers of one head, most frequent first, with the first object of the scene."""
    wrong: Counter[tuple[str, str, str]] = Counter()
    for verdict, shown in pairs:
        true, judged = labels_of(shown)[head], getattr(verdict, head)
        if true is not None and judged != true:
            wrong[(true, judged, shown.objects[0])] += 1
    return [
        {"true": true, "judged": judged, "object": word, "scenes": count}
        for (true, judged, word), count in wrong.most_common(_NUM_CONFUSIONS)
    ]
