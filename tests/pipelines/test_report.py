"""The report: whole, of what is there, with texts of users as texts, and readable by everyone."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from pandas import DataFrame

from dreamartist_pipeline.core.choosing import Bounds, Score, rows_of_scores
from dreamartist_pipeline.interop.drawn_pictures import write_pictures
from dreamartist_pipeline.pipelines.report.charts import Interval, IntervalRow, interval_chart, line_charts
from dreamartist_pipeline.pipelines.report.contents import contents_of
from dreamartist_pipeline.pipelines.report.nodes import write_report
from dreamartist_pipeline.pipelines.training.figures import plot_history
from report_pages import HOSTILE, METADATA, REMEDIES, attention, facts, history, page, pictures, sources


class Outline(HTMLParser):
    """What of a page can be checked without a browser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]


@pytest.fixture(scope="module")
def whole() -> Outline:
    return Outline(page())


def test_every_section_has_its_contents(whole: Outline) -> None:
    for text in ("white background", "my-fox-neg", "training.num_steps", "400", "kedro run --pipeline generate"):
        assert text in whole.text, text
    for text in ("without the negative adapter", "scale 2", "torch", "ff" * 32, "lora/fox.safetensors", "12 kB"):
        assert text in whole.text, text
    for text in ("generate.recommended=true", "Guidance scale: as configured.", "concept, positive: 0 to 20%"):
        assert text in whole.text, text
    assert whole.tags["svg"] == 4 + 3  # panels of the training, units of the measures
    assert "missing" not in [attributes.get("class") for attributes in whole.of("div")]


def test_the_page_refers_to_nothing_outside_it() -> None:
    text = page()
    assert not re.findall(r"<(?:link|script|iframe|object|base|form)\b|@import|url\((?!#)", text)
    targets = re.findall(r'\b(?:src|href|srcset|xlink:href)="([^"]*)"', text)
    assert targets and all(target.startswith(("data:image/webp;base64,", "#")) for target in targets)


def test_texts_of_users_are_texts() -> None:
    hostile = facts(
        subject=HOSTILE,
        command=HOSTILE,
        changed={HOSTILE: (HOSTILE, HOSTILE)},
        configuration={"caption": HOSTILE, "method": HOSTILE},
        next=((HOSTILE, HOSTILE),),
        files={HOSTILE: HOSTILE},
    )
    metadata = METADATA.model_copy(update={"class_word": HOSTILE, "words": {"pt1": (HOSTILE, HOSTILE)}})
    drawn = {"pictures": pictures(HOSTILE), "attention": attention(HOSTILE)}
    text = page(facts=hostile, metadata=metadata, plan={"caption": HOSTILE}, **drawn)
    outline = Outline(text)
    assert "script" not in outline.tags
    assert outline.text.count(HOSTILE) > 15
    assert any(HOSTILE in str(attributes["alt"]) for attributes in outline.of("img"))


def test_labels_of_charts_are_texts() -> None:
    chart = interval_chart([IntervalRow(HOSTILE, Interval(0.5, 0.4, 0.6), Interval(0.1))], HOSTILE, "chart")
    outline = Outline(str(chart.svg))
    assert "script" not in outline.tags
    assert HOSTILE in outline.text
    assert HOSTILE in str(outline.of("svg")[0]["aria-label"])


def test_pictures_tables_and_headings_can_be_read_aloud(whole: Outline) -> None:
    assert whole.of("html")[0]["lang"] == "en"
    assert all(attributes["alt"] for attributes in whole.of("img"))
    assert all(attributes["aria-label"] for attributes in whole.of("svg"))
    assert whole.tags["table"] == whole.tags["caption"] == whole.tags["thead"]
    assert all(attributes.get("scope") for attributes in whole.of("th"))
    levels = [int(tag[1]) for tag, _ in whole.attributes if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_ids_are_unique_and_links_lead_to_them(whole: Outline) -> None:
    ids = [attributes["id"] for _, attributes in whole.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(link["href"])[1:] for link in whole.of("a")} <= set(ids)


def test_colours_of_charts_are_those_of_the_page() -> None:
    text = page()
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in _rules(text))
    assert used <= light
    assert {name for name in used if name.startswith("--c")} <= dark


def _rules(text: str) -> tuple[str, str]:
    style = text[text.index("<style>") : text.index("</style>")]
    dark = re.findall(r"@media screen and \(prefers-color-scheme: dark\) \{.*?\}\s*\}", style, flags=re.DOTALL)
    return style, "".join(dark)


def test_panels_of_scores_show_bounds_the_base_model_and_the_chosen_step() -> None:
    scores = [Score(step, fidelity, 0.9, 0.1, 0.2, 0.3) for step, fidelity in ((20, 0.5), (60, 0.7))]
    rows = rows_of_scores(scores, Bounds(0.5, 0.5, 0.1), {"fidelity": 0.3}, chosen=60)
    charts = {
        chart.description.split(" over")[0]: chart
        for chart in line_charts(plot_history(history(), DataFrame(rows)), "c")
    }
    fidelity, agreement = charts["fidelity of scored steps (×: beyond a bound)"], charts["agreement with prompts"]
    chosen, base_model, beyond, values = "#d55e00", "#6d6d78", "#cc79a7", "#0072b2"
    assert fidelity.colors == {values, chosen, base_model}
    assert agreement.colors == {values, chosen, beyond}
    assert "over 60 steps" in fidelity.description
    assert "over 30 steps" in charts["loss"].description


def test_equal_inputs_give_equal_pages() -> None:
    assert page() == page()


@pytest.mark.parametrize(
    ("changes", "pipeline"),
    [
        ({"pictures": None, "measures": None}, "evaluate"),
        ({"strengths_sheet": None, "recommended": None}, "evaluate"),
        ({"attention": None}, "evaluate"),
        ({"curves": None}, "train"),
        ({"prepared_image": None, "reconstruction": None}, "train"),
        ({"export": None}, "export"),
        ({"facts": facts(previews=None)}, "train"),
    ],
)
def test_what_is_missing_is_said_with_the_command_that_makes_it(changes: dict[str, object], pipeline: str) -> None:
    outline = Outline(page(**changes))
    assert "missing" in [attributes.get("class") for attributes in outline.of("div")]
    assert REMEDIES[pipeline] in outline.text


def test_a_concept_alone_has_a_report() -> None:
    nothing = dict.fromkeys(
        [
            *("prepared_image", "reconstruction", "plan", "curves", "measures", "pictures", "export"),
            *("strengths_sheet", "guidance_sheet", "recommended", "attention"),
        ],
        None,
    )
    outline = Outline(page(**nothing, facts=facts(previews=None, made="", configuration={}, changed={}, versions={})))
    assert "my-fox" in outline.text
    assert outline.tags["img"] == outline.tags["svg"] == 0


def test_the_verdict_is_that_of_the_intervals() -> None:
    lines = {line.title: line for line in contents_of(sources()).measures}
    assert lines["fidelity, object alone"].verdict == "better"
    assert lines["recognition"].verdict == "intervals overlap"
    assert lines["prior drift"].verdict == "worse"
    assert lines["fidelity, object alone"].concept == "0.700 [0.650, 0.750]"
    assert lines["recognition"].floor == "55% [45%, 65%]"
    assert lines["prior drift"].ceiling == "–"
    effects = contents_of(sources()).effects
    assert [(line.by, line.verdict) for line in effects] == [("negative adapter", "better"), ("scale 2", "")]


def test_base_model_and_concept_stand_side_by_side_by_their_seeds() -> None:
    table = contents_of(sources()).subject
    assert table is not None
    (row,) = table.rows
    assert [[one.alt.split(":")[0] for one in cell] for cell in row.cells] == [
        ["base model, seed 1", "base model, seed 2"],
        ["concept, seed 1", "concept, seed 2"],
    ]


def test_what_the_evaluation_was_told_to_leave_out_is_not_missing() -> None:
    outline = Outline(page(recommended=None, attention=write_pictures([])))
    assert "missing" not in [attributes.get("class") for attributes in outline.of("div")]
    for option in ("evaluation.sweep.images is 0", "evaluation.attention_images is 0"):
        assert option in outline.text


def test_maps_of_attention_stand_beside_their_pictures() -> None:
    table = contents_of(sources()).attention
    assert table is not None
    assert list(table.columns[:3]) == ["base model", "base model, positive: 0 to 5%", "concept"]
    assert [[one.alt for one in cell] for cell in table.rows[0].cells][-1] == [
        "concept, negative: 0 to 3%, seed 1: a my-fox, blue background"
    ]


def test_the_steps_of_concept_and_evaluation_are_said() -> None:
    metadata = METADATA.model_copy(update={"step": 40, "chosen": "it has the highest fidelity"})
    configuration = {**facts().configuration, "evaluation.step": 20}
    asked = dict(contents_of(sources(metadata=metadata, facts=facts(configuration=configuration))).asked)
    assert asked["step of the concept"] == "40: it has the highest fidelity"
    assert asked["step of the evaluation"] == "20"
    assert not {"step of the concept", "step of the evaluation"} & dict(contents_of(sources()).asked).keys()


def test_the_node_writes_the_page_of_what_it_is_given() -> None:
    from types import SimpleNamespace

    concept = SimpleNamespace(metadata=METADATA)
    assert "is not evaluated yet" in write_report(concept, facts(), training_plan={"caption": ""})  # type: ignore[arg-type]
