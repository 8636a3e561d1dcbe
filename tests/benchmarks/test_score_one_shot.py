"""The one-shot benchmark: what it asks the base model and the concepts, and how verdicts become rows."""

from __future__ import annotations

import importlib

import pandas as pd
import pytest

from dreamartist_pipeline.embedded.judge import Judge, JudgeVocabulary
from dreamartist_pipeline.embedded.scenes import Shown
from markdown_tables import cells


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("score_one_shot")


def shown(caption: str, word: str, tint: str = "") -> Shown:
    return Shown((word,), (tint,), "flat", "one", "plain", "blue", "red", caption)


@pytest.mark.parametrize(
    ("caption", "word", "template"),
    [
        ("an apple, flat style", "apple", "a {}, flat style"),
        ("an orange apple, blue background", "apple", "an orange {}, blue background"),
        ("one ice cream, on a blue background", "ice cream", "one {}, on a blue background"),
        ("a tiny cat, in flat style", "cat", "a tiny {}, in flat style"),
    ],
)
def test_the_trigger_word_replaces_the_object_of_a_caption(bench, caption, word, template):
    assert bench.as_template(shown(caption, word)) == template


def test_attributes_that_a_caption_omits_are_not_scored(bench):
    assert bench.asked(shown("a cat, flat style", "cat")) == []
    assert bench.asked(shown("a cat, blue background", "cat")) == ["background"]
    assert bench.asked(shown("a red cat, flat style", "cat", "red")) == ["tint"]


def test_every_task_has_one_object_and_a_scored_attribute(bench):
    judge = Judge(JudgeVocabulary(("cat", "apple"), ("flat",)), channels=(4, 4))
    tasks = bench.draw_tasks(judge, num_prompts=20, seed=0)
    assert len(tasks) == 20
    assert all(bench.asked(task.shown) and task.template.count("{}") == 1 for task in tasks)


def test_a_subject_may_fall_ten_points_behind_the_base_model_and_no_more(bench):
    table = bench.tabulate(
        {
            "base model": {"background": 0.95, "tint": 0.9},
            "fox": {"background": 0.86, "tint": 0.9},
            "owl": {"background": 0.95, "tint": 0.7},
        }
    )
    assert table.loc["mean of the subjects"].tolist() == pytest.approx([0.905, 0.8])
    report = bench.to_markdown(table)
    assert cells(report, "fox") == ["86% (-9)", "90% (+0)", "yes"]
    assert cells(report, "owl")[1:] == ["70% (-20)", "no"]


def test_a_concept_that_is_as_good_as_the_base_model_passes_whatever_rounding_does(bench):
    table = pd.DataFrame({"background": [0.3, 0.2], "tint": [0.3, 0.2]}, index=["base model", "fox"])
    assert cells(bench.to_markdown(table), "fox")[-1] == "yes"
