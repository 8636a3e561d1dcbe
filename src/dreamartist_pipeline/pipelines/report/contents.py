"""What the page says, as plain values: texts, tables, pictures and charts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from dreamartist_pipeline.core import measures
from dreamartist_pipeline.core.figures import CELL_PX
from dreamartist_pipeline.interop.drawn_pictures import Kind, StoredPicture, as_webp, read_pictures
from dreamartist_pipeline.pipelines.report.charts import Chart, Interval, IntervalRow, interval_chart, line_charts
from dreamartist_pipeline.run_facts import RunFacts

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import ConceptMetadata
    from dreamartist_pipeline.core.strengths import RecommendedSettings

_PICTURE_PX, _SHEET_PX = 2 * CELL_PX[1], 2400  # longer sides of single pictures and of sheets
_UNSET = "–"
_SAME_SEEDS = "A row per prompt; pictures at the same place in each column have the same seed."
_ARROWS = {"higher": " ↑", "lower": " ↓"}
_HEADLINES = (measures.RECOGNITION, measures.SIMILARITY, measures.CLIP_SCORE, measures.PRIOR_DRIFT)
_SWEPT = ("effect/", "guidance/")  # measures of the section on branches
_AXES = {"share": "share of pictures", "cosine": "cosine similarity", "score": "score"}
_MODELS = {"base": "base model", "concept": "concept"}
_PARTS = {"negative_adapter": "negative adapter", "negative_word": "negative word"}


@dataclass(frozen=True)
class Sources:
    """What the page is made of; None for what is missing."""

    metadata: ConceptMetadata
    facts: RunFacts
    prepared_image: Image.Image | None = None
    reconstruction: Image.Image | None = None
    plan: Mapping[str, Any] | None = None
    curves: Any = None
    measures: pd.DataFrame | None = None
    pictures: Mapping[str, bytes] | None = None
    strengths_sheet: Image.Image | None = None
    guidance_sheet: Image.Image | None = None
    recommended: RecommendedSettings | None = None
    attention: Mapping[str, bytes] | None = None
    export: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Picture:
    """A picture on the page.

    Attributes:
        src: data URI.
        alt: what it shows.
        width: px.
        height: px.
    """

    src: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class PictureRow:
    """The pictures of one prompt, a cell per column."""

    prompt: str
    cells: Sequence[Sequence[Picture]]


@dataclass(frozen=True)
class PictureTable:
    """Prompts × columns of pictures."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[PictureRow]


@dataclass(frozen=True)
class Comparison:
    """Compared settings, and those that are recommended.

    Attributes:
        recommended: (name, value).
        reasons: as sentences.
        strengths: sheet of positive × negative strengths.
        guidance: sheet of steps × guidance scales.
    """

    recommended: Sequence[tuple[str, str]]
    reasons: Sequence[str]
    strengths: Picture | None
    guidance: Picture | None


@dataclass(frozen=True)
class Missing:
    """What the page lacks, and the command that makes it."""

    what: str
    command: str


@dataclass(frozen=True)
class MeasureLine:
    """A line of the table of measures, as texts.

    Attributes:
        title: of the measure.
        by: the model that measures, and what differs from other pictures.
        better: which values are better.
        concept: with its interval.
        floor: with its interval.
        reference: of the reference itself.
        ceiling: of its reconstruction.
        verdict: whether the intervals of concept and floor overlap.
    """

    title: str
    by: str
    better: str
    concept: str
    floor: str
    reference: str
    ceiling: str
    verdict: str


@dataclass(frozen=True)
class Headline:
    """A number at the top of the page."""

    title: str
    value: str
    beside: str
    verdict: str


@dataclass(frozen=True)
class Contents:
    """Everything on the page, in its order; see the template."""

    facts: RunFacts
    words: Sequence[tuple[str, str]]
    caption: str | None
    asked: Sequence[tuple[str, str]]
    prepared: Picture | None
    reconstruction: Picture | None
    headlines: Sequence[Headline]
    subject: PictureTable | None
    prior: PictureTable | None
    previews: Picture | None
    comparison: Comparison | None
    branches: Sequence[PictureTable]
    guidance: PictureTable | None
    effects: Sequence[MeasureLine]
    attention: PictureTable | None
    curves: Sequence[Chart]
    measure_charts: Sequence[Chart]
    measures: Sequence[MeasureLine]
    not_measured: Sequence[tuple[str, str]]
    changed: Sequence[tuple[str, str, str]]
    settings: Sequence[tuple[str, str]]
    exported: Sequence[tuple[str, str]]
    identity: Sequence[tuple[str, str]]
    missing: Sequence[Missing] = field(default=())

    @property
    def charts(self) -> list[Chart]:
        """All charts."""
        return [*self.curves, *self.measure_charts]

    def lacking(self, what: str) -> Missing | None:
        """Return the entry of something that is missing, if it is."""
        return next((each for each in self.missing if each.what == what), None)


def contents_of(sources: Sources) -> Contents:
    """Return the contents of the page.

    Raises:
        InputError: the folder of the evaluation's pictures is damaged.
    """
    facts, metadata = sources.facts, sources.metadata
    stored = [] if sources.pictures is None else read_pictures(sources.pictures, "evaluation_pictures")
    measured = _MeasuredRows.of(sources.measures)
    return Contents(
        facts=facts,
        words=list(metadata.words.values()),
        caption=None if sources.plan is None else str(sources.plan.get("caption", "")),
        asked=_asked(sources),
        prepared=_picture(sources.prepared_image, "The reference picture as it was trained on"),
        reconstruction=_picture(
            sources.reconstruction, "The reference picture, and beside it what the base model's autoencoder makes of it"
        ),
        headlines=[_headline(row) for row in measured.headlines()],
        subject=_before_after(stored, "subject", "With the trigger word"),
        prior=_before_after(stored, "prior", "Without the trigger word"),
        previews=_previews(facts.previews),
        comparison=None if sources.recommended is None else _comparison(sources, sources.recommended),
        branches=_branch_tables(stored),
        guidance=_guidance_table(stored),
        effects=[_line(row) for row in measured.swept()],
        attention=_attention(sources.attention),
        curves=[] if sources.curves is None else line_charts(sources.curves, "curve"),
        measure_charts=_measure_charts(measured.plain()),
        measures=[_line(row) for row in measured.plain()],
        not_measured=measured.not_measured(),
        changed=[(name, _text(default), _text(value)) for name, (default, value) in facts.changed.items()],
        settings=[(name, _text(value)) for name, value in facts.configuration.items()],
        exported=_exported(sources.export),
        identity=_identity(sources),
        missing=_missing(sources),
    )


def _missing(sources: Sources) -> list[Missing]:
    found = {
        "picture": (sources.prepared_image, "train"),
        "evaluation": (sources.measures if sources.pictures is not None else None, "evaluate"),
        "strengths": (sources.strengths_sheet, "evaluate"),
        "attention": (sources.attention, "evaluate"),
        "curves": (sources.curves, "train"),
        "previews": (sources.facts.previews, "train"),
        "export": (sources.export, "export"),
    }
    remedies = sources.facts.remedies
    return [Missing(what, remedies.get(by, "")) for what, (source, by) in found.items() if source is None]


# ------------------------------------------------------------------------------------------- what was asked


def _asked(sources: Sources) -> list[tuple[str, str]]:
    """Return (name, value) of what the user has given, and what the concept was trained on."""
    metadata, configuration = sources.metadata, sources.facts.configuration
    words = [f"{positive} / {negative}" if negative else positive for positive, negative in metadata.words.values()]
    asked = {
        "trigger words": ", ".join(words),
        "class word": metadata.class_word,
        "method": configuration.get("method"),
        "base model": metadata.base_model,
        "steps": metadata.num_steps or None,
        "step of the concept": metadata.step if metadata.chosen is None else f"{metadata.step}: {metadata.chosen}",
        "step of the evaluation": configuration.get("evaluation.step"),
        "guidance scale of the training": metadata.guidance_scale,
        "seed": metadata.seed,
        "imported from": ", ".join(name for name, _ in metadata.imported_from or ()),
    }
    return [(name, str(value)) for name, value in asked.items() if value not in (None, "")]


def _identity(sources: Sources) -> list[tuple[str, str]]:
    facts, metadata = sources.facts, sources.metadata
    hashes = {
        **facts.hashes,
        "base_model": metadata.base_model_fingerprint,
        "prepared_image": metadata.picture_sha256,
        "options of the training": metadata.config_sha256,
    }
    return [(name.replace("_", " "), value) for name, value in hashes.items() if value]


def _exported(report: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return (file, size) of exported files."""
    files = {} if report is None else report["files"]
    return [(name, f"{entry['bytes'] / 1000:,.0f} kB") for name, entry in files.items()]


# ------------------------------------------------------------------------------------------- pictures


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _picture(image: Image.Image | None, alt: str, side_px: int = _PICTURE_PX) -> Picture | None:
    return None if image is None else Picture(_data_uri(as_webp(image, side_px)), alt, *image.size)


def _previews(file: bytes | None) -> Picture | None:
    """Return the sheet of previews, whose file is written by the training."""
    if file is None:
        return None
    with Image.open(io.BytesIO(file)) as sheet:
        alt = "Previews during the training: a row per prompt, a column per step, same seeds"
        return _picture(sheet, alt, _SHEET_PX)


def _comparison(sources: Sources, recommended: RecommendedSettings) -> Comparison:
    values = {
        "strength of the positive adapter": f"{recommended.strength.positive:g}",
        "strength of the negative adapter": f"{recommended.strength.negative:g}",
        "guidance scale": f"{recommended.guidance_scale:g}",
        "pictures compared per setting": str(recommended.num_images),
    }
    strengths = "Pictures by strength: a row per strength of the positive adapter, a column per one of the negative"
    guidance = "Pictures by guidance scale: a row per step of the training, a column per scale"
    return Comparison(
        recommended=list(values.items()),
        reasons=[f"{reason[:1].upper()}{reason[1:]}." for reason in recommended.reasons],
        strengths=_picture(sources.strengths_sheet, strengths, _SHEET_PX),
        guidance=_picture(sources.guidance_sheet, guidance, _SHEET_PX),
    )


def _cells(pictures: Iterable[StoredPicture], what: str) -> list[Picture]:
    cells = []
    for one in pictures:
        with Image.open(io.BytesIO(one.webp)) as image:
            size = image.size
        cells.append(Picture(_data_uri(one.webp), f"{what}, seed {one.entry.seed}: {one.entry.prompt}", *size))
    return cells


def _prompts(pictures: Iterable[StoredPicture]) -> list[str]:
    return list(dict.fromkeys(one.entry.prompt for one in pictures))


def _before_after(stored: Sequence[StoredPicture], kind: Kind, title: str) -> PictureTable | None:
    """Return base model and concept side by side: their pictures are in the same order."""
    base, concept = (
        [one for one in stored if one.entry.kind == kind and one.entry.group == group] for group in ("base", "concept")
    )
    rows: dict[tuple[str, str], list[tuple[StoredPicture, StoredPicture]]] = {}
    for before, after in zip(base, concept, strict=True):
        rows.setdefault((before.entry.prompt, after.entry.prompt), []).append((before, after))
    lines = [
        PictureRow(
            _change(before, after),
            [_cells((one for one, _ in pairs), _MODELS["base"]), _cells((one for _, one in pairs), _MODELS["concept"])],
        )
        for (before, after), pairs in rows.items()
    ]
    return PictureTable(title, _SAME_SEEDS, ("base model", "with the concept"), lines) if lines else None


def _change(before: str, after: str) -> str:
    return after if after == before else f"{before} → {after}"


def _branch_tables(stored: Sequence[StoredPicture]) -> list[PictureTable]:
    """Return a table per part of the negative branch, with and without it."""
    of_branches = [one for one in stored if one.entry.kind == "branch"]
    parts = dict.fromkeys(one.entry.condition for one in of_branches)
    return [_branch_table([one for one in of_branches if one.entry.condition == part], part) for part in parts]


def _branch_table(pictures: Sequence[StoredPicture], part: str) -> PictureTable:
    name = _PARTS.get(part, part)
    columns = {group: f"{group} the {name}" for group in ("without", "with")}
    return _table(pictures, columns, [one.entry.group for one in pictures], f"With and without the {name}")


def _guidance_table(stored: Sequence[StoredPicture]) -> PictureTable | None:
    pictures = [one for one in stored if one.entry.kind == "guidance"]
    scales = {one.entry.condition: f"scale {one.entry.condition}" for one in pictures}
    keys = [one.entry.condition for one in pictures]
    return _table(pictures, scales, keys, "Guidance scale of generation") if pictures else None


def _table(
    pictures: Sequence[StoredPicture], columns: Mapping[str, str], keys: Sequence[str], title: str
) -> PictureTable:
    """Return prompts × columns; `keys` has the column of each picture."""
    rows = [
        PictureRow(
            prompt,
            [
                _cells(
                    (one for one, of in zip(pictures, keys, strict=True) if one.entry.prompt == prompt and of == key),
                    columns[key],
                )
                for key in columns
            ],
        )
        for prompt in _prompts(pictures)
    ]
    return PictureTable(title, _SAME_SEEDS, list(columns.values()), rows)


def _attention(files: Mapping[str, bytes] | None) -> PictureTable | None:
    """Return pictures of base model and concept, each beside its maps: the images of a column have an order."""
    columns: dict[str, list[StoredPicture]] = {}
    for one in [] if files is None else read_pictures(files, "attention_pictures"):
        model = _MODELS[one.entry.group]
        columns.setdefault(", ".join(filter(None, [model, one.entry.condition])), []).append(one)
    rows = [
        PictureRow(
            _change(row[0].entry.prompt, row[-1].entry.prompt),
            [_cells([one], name) for name, one in zip(columns, row, strict=True)],
        )
        for row in zip(*columns.values(), strict=True)
    ]
    caption = "A row per prompt, from one seed. A map covers the picture to its left."
    return PictureTable("Attention", caption, list(columns), rows) if rows else None


# ------------------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class _MeasuredRows:
    """The rows of evaluation_measures.csv; an empty cell is "" in columns of texts, and NaN in others."""

    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, table: pd.DataFrame | None) -> _MeasuredRows:
        if table is None:
            return cls([])
        texts = ["measure", "condition", "by", "title", "better", "unit", "left_out"]
        filled = table.assign(**{name: table[name].fillna("").astype(str) for name in texts})
        return cls([{str(name): value for name, value in row.items()} for row in filled.to_dict("records")])

    def plain(self) -> list[Mapping[str, Any]]:
        """Return what is measured of the concept as it is used."""
        return [row for row in self.rows if not row["left_out"] and not row["measure"].startswith(_SWEPT)]

    def swept(self) -> list[Mapping[str, Any]]:
        """Return the effects of parts of the negative branch, and of the guidance scale."""
        return [row for row in self.rows if not row["left_out"] and row["measure"].startswith(_SWEPT)]

    def not_measured(self) -> list[tuple[str, str]]:
        """Return (title, why) of what is not measured."""
        return [(row["title"], row["left_out"]) for row in self.rows if row["left_out"]]

    def headlines(self) -> list[Mapping[str, Any]]:
        """Return the first row of each measure at the top of the page."""
        plain = self.plain()
        firsts = (next((row for row in plain if row["measure"] == one.name), None) for one in _HEADLINES)
        return [row for row in firsts if row is not None]


def _measure_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return a chart per unit: values of different units do not share an axis."""
    units = dict.fromkeys(row["unit"] for row in rows)
    return [
        interval_chart(
            [_interval_row(row) for row in rows if row["unit"] == unit],
            _AXES.get(unit, unit),
            f"measure-{index}",
            as_percent=unit == "share",
        )
        for index, unit in enumerate(units)
    ]


def _interval_row(row: Mapping[str, Any]) -> IntervalRow:
    label = row["title"] + (f" · {row['by']}" if row["by"] else "") + _ARROWS.get(row["better"], "")
    return IntervalRow(label, _interval(row, "concept"), _interval(row, "base"), row["ceiling"])


def _interval(row: Mapping[str, Any], group: str) -> Interval:
    return Interval(row[group], row[f"{group}_low"], row[f"{group}_high"])


def _line(row: Mapping[str, Any]) -> MeasureLine:
    unit = row["unit"]
    beside = [_PARTS.get(row["condition"], _condition(row)), row["by"]]
    return MeasureLine(
        title=row["title"],
        by=" · ".join(filter(None, beside)),
        better={"higher": "higher", "lower": "lower"}.get(row["better"], _UNSET),
        concept=_with_interval(_interval(row, "concept"), unit),
        floor=_with_interval(_interval(row, "base"), unit),
        reference=_number(row["reference"], unit),
        ceiling=_number(row["ceiling"], unit),
        verdict=_verdict(row),
    )


def _condition(row: Mapping[str, Any]) -> str:
    """Return the condition of a row in words; scales of a table without other conditions are read as numbers."""
    condition = row["condition"]
    return f"scale {float(condition):g}" if condition and row["measure"].startswith("guidance/") else condition


def _headline(row: Mapping[str, Any]) -> Headline:
    concept, floor = _interval(row, "concept"), _interval(row, "base")
    ends = [f"{_number(concept.low, row['unit'])} to {_number(concept.high, row['unit'])}"]
    if math.isfinite(floor.mean):
        ends.append(f"base model {_number(floor.mean, row['unit'])}")
    return Headline(row["title"], _number(concept.mean, row["unit"]), " · ".join(ends), _verdict(row))


def _with_interval(interval: Interval, unit: str) -> str:
    value = _number(interval.mean, unit)
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return value
    return f"{value} [{_number(interval.low, unit)}, {_number(interval.high, unit)}]"


def _number(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return _UNSET
    return f"{value:.0%}" if unit == "share" else f"{value:.3f}"


def _verdict(row: Mapping[str, Any]) -> str:
    """Say how the concept compares with the floor, where both have intervals and one direction is better.

    An effect has the floor 0, without an interval: it is a difference of pairs of pictures.
    """
    concept, floor = _interval(row, "concept"), _interval(row, "base")
    if row["measure"].startswith("effect/"):
        floor = Interval(floor.mean, floor.mean, floor.mean)
    bounds = (concept.low, concept.high, floor.low, floor.high)
    if row["better"] not in ("higher", "lower") or not all(map(math.isfinite, bounds)):
        return ""
    if concept.low <= floor.high and floor.low <= concept.high:
        return "intervals overlap"
    return "better" if (concept.mean > floor.mean) == (row["better"] == "higher") else "worse"


def _text(value: Any) -> str:
    """Return a value of the configuration as a text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
