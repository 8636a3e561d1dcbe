"""Compare strengths, and guidance scales by step, from the same prompts and seeds, and recommend values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from dreamartist_pipeline.core.branches import BRANCH_NAMES
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.kept_steps import KeptSteps
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.core.measures import (
    SIMILARITY,
    Embedder,
    SubjectMeasures,
    TextImageScorer,
    background_leakage,
)
from dreamartist_pipeline.core.metrics import copying_share
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.strengths import (
    Recommendation,
    RecommendedSettings,
    Setting,
    SettingBounds,
    SettingMeasures,
    recommend,
)
from dreamartist_pipeline.embedded.agreement import prompt_agreement
from dreamartist_pipeline.params import DeviceParams, EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.drawing import draw_settings
from dreamartist_pipeline.pipelines.evaluation.measuring import Drawings, TableRow

DrawSettings = Callable[[Sequence[Setting | None]], dict[Setting | None, Drawings]]
"""Settings, None for the base model -> the pictures of each, of the same prompts and seeds."""

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Values:
    """Measures of the pictures of one setting, each `[N]` or None."""

    fidelity: torch.Tensor | None
    crop_distance: torch.Tensor | None
    leakage: torch.Tensor
    agreement: float | None


class SettingJudge:
    """Measures the pictures of settings, relative to those of the base model.

    Attributes:
        base_agreement: of the base model's pictures with the class word; None if it is not measured.
    """

    def __init__(
        self,
        reference: Image.Image,
        class_word: str,
        base: Drawings,
        embedder: Embedder | None,
        text_image: TextImageScorer | None,
        reads_colors: bool,
    ) -> None:
        """Measure the base model's pictures.

        Args:
            reference: the prepared image.
            class_word: replaces trigger words for the text-image score.
            base: the base model's pictures.
            embedder: the image tower, or None.
            text_image: for agreement, or None.
            reads_colors: whether agreement is that of backgrounds which prompts name.
        """
        self._reference, self._class_word = reference, class_word
        self._against = None if embedder is None else SubjectMeasures.of(embedder, reference)
        self._text_image, self._reads_colors = text_image, reads_colors
        self._base = self._values(base)
        self.base_agreement = self._base.agreement

    def __call__(self, drawings: Drawings) -> SettingMeasures:
        """Return the measures of the pictures of one setting."""
        values, base = self._values(drawings), self._base
        if values.fidelity is None or values.crop_distance is None or base.crop_distance is None:
            return SettingMeasures((), values.agreement, None)
        base_means = float(base.crop_distance.mean()), float(base.leakage.mean())
        copying = copying_share(values.crop_distance, values.leakage, *base_means)
        return SettingMeasures(tuple(values.fidelity.tolist()), values.agreement, float(copying.mean()))

    def _values(self, drawings: Drawings) -> _Values:
        images, templates = drawings.flat(), drawings.flat_templates()
        leakage, agreement = background_leakage(images, self._reference), self._agreement(templates, images)
        if self._against is None:
            return _Values(None, None, leakage, agreement)
        pictures = self._against.embed(images, templates)
        fidelity = self._against.fidelity(pictures)[SIMILARITY.name]
        return _Values(fidelity, self._against.crop_distance(pictures), leakage, agreement)

    def _agreement(self, templates: Sequence[str], images: Sequence[Image.Image]) -> float | None:
        """Return how well pictures fit their prompts; see `prompt_agreement`."""
        return prompt_agreement(templates, images, self._class_word, self._text_image, self._reads_colors)


# ------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Comparison:
    """Settings in rows and columns, drawn and measured.

    Attributes:
        rows: heading of each row -> its settings, one per column.
        columns: headings.
        drawings: of each setting.
        measures: of each setting.
        usual: the configured setting.
        recommended: one of them, and why.
    """

    rows: Mapping[str, Sequence[Setting]]
    columns: Sequence[str]
    drawings: Mapping[Setting, Drawings]
    measures: Mapping[Setting, SettingMeasures]
    usual: Setting
    recommended: Recommendation

    def table(self, sheet: str) -> list[TableRow]:
        """Return a row per setting, with the name of the sheet that shows it."""
        return [
            {
                "sheet": sheet,
                "step": setting.step,
                "positive": setting.positive,
                "negative": setting.negative,
                "guidance_scale": setting.guidance_scale,
                "fidelity": self.measures[setting].mean_fidelity,
                "agreement": self.measures[setting].agreement,
                "copying": self.measures[setting].copying,
                "images": len(self.drawings[setting].flat()),
                "configured": setting == self.usual,
                "recommended": setting == self.recommended.setting,
            }
            for row in self.rows.values()
            for setting in row
        ]


def strength_settings(params: EvaluationParams, adapted: Collection[str]) -> list[list[Setting]]:
    """Return the compared strengths: a row per positive strength, ascending, and a column per negative one.

    Args:
        params: of the evaluation.
        adapted: branches with an adapter; strengths of others change nothing, and only the configured one is drawn.
    """
    positive, negative = (
        sorted({*(getattr(params.sweep, branch) if branch in adapted else ()), getattr(params.strength, branch)})
        for branch in ("positive", "negative")
    )
    scale = params.sampler.guidance_scale
    return [[Setting(high, low, scale) for low in negative] for high in positive]


def guidance_settings(params: EvaluationParams, strengths: Setting, steps: Sequence[int | None]) -> list[list[Setting]]:
    """Return the compared guidance scales: a row per step, and a column per scale, ascending.

    Args:
        params: of the evaluation.
        strengths: the setting with the strengths.
        steps: of the rows; None for the concept itself.
    """
    scales = sorted({*params.sweep.guidance_scales, params.sampler.guidance_scale})
    return [[replace(strengths, step=step, guidance_scale=scale) for scale in scales] for step in steps]


def shown_steps(kept: Sequence[int], own: int, most: int) -> list[int | None]:
    """Return the steps of the sheet in order: the concept's own, as None, and kept ones, evenly spread.

    Args:
        kept: steps with a kept concept.
        own: the step of the concept.
        most: number of steps, at least 1.
    """
    others = sorted(step for step in kept if step != own)
    count = min(most - 1, len(others))
    chosen = [others[round(index * (len(others) - 1) / max(count - 1, 1))] for index in range(count)]
    return [None if step == own else step for step in sorted([*chosen, own])]


def compare_settings(
    draw: DrawSettings,
    judge_of: Callable[[Drawings], SettingJudge],
    steps: Sequence[int | None],
    own_step: int,
    adapted: Collection[str],
    params: EvaluationParams,
) -> tuple[Comparison, Comparison]:
    """Compare strengths at the configured guidance scale, then guidance scales by step at the recommended strengths.

    Args:
        draw: draws settings.
        judge_of: base model's pictures -> what measures those of settings.
        steps: see `shown_steps`.
        own_step: of the concept.
        adapted: branches of the concept with an adapter.
        params: of the evaluation.
    """
    grid = strength_settings(params, adapted)
    usual = Setting(params.strength.positive, params.strength.negative, params.sampler.guidance_scale)
    flat = [setting for row in grid for setting in row]
    drawn = draw([None, *flat])
    judge = judge_of(drawn.pop(None))
    bounds = SettingBounds.of(params.sweep, judge.base_agreement)
    drawings = {setting: drawn[setting] for setting in flat}
    measured = {setting: judge(drawings[setting]) for setting in flat}
    rows = {f"positive {row[0].positive:g}": row for row in grid}
    columns = [f"negative {setting.negative:g}" for setting in grid[0]]
    best = recommend(measured, usual, bounds, "strengths")
    strengths = Comparison(rows, columns, drawings, measured, usual, best)
    grid = guidance_settings(params, best.setting, steps)
    return strengths, _by_guidance(draw, judge, bounds, strengths, grid, own_step)


def _by_guidance(
    draw: DrawSettings,
    judge: SettingJudge,
    bounds: SettingBounds,
    strengths: Comparison,
    grid: Sequence[Sequence[Setting]],
    own_step: int,
) -> Comparison:
    """Compare guidance scales; the scale of the concept itself is recommended, and no other step."""
    usual = strengths.recommended.setting  # drawn already
    flat = [setting for row in grid for setting in row]
    drawn = draw([setting for setting in flat if setting != usual])
    drawings = {setting: strengths.drawings[usual] if setting == usual else drawn[setting] for setting in flat}
    measured = {setting: judge(drawings[setting]) for setting in flat}
    own = {setting: one for setting, one in measured.items() if setting.step is None}
    rows = {_step_heading(row[0].step, own_step): row for row in grid}
    columns = [f"guidance scale {setting.guidance_scale:g}" for setting in grid[0]]
    best = recommend(own, usual, bounds, "guidance scale")
    return Comparison(rows, columns, drawings, measured, usual, best)


def _step_heading(step: int | None, own_step: int) -> str:
    return f"step {own_step}, the concept" if step is None else f"step {step}"


def recommended_settings(concept: Concept, strengths: Comparison, guidance: Comparison) -> RecommendedSettings:
    """Return what is recommended for a concept, with the measures of the pictures that were drawn with it."""
    setting = guidance.recommended.setting
    measures = guidance.measures[setting]
    return RecommendedSettings(
        strength=setting.strength,
        guidance_scale=setting.guidance_scale,
        concept_sha256=concept.sha256(),
        reasons=(strengths.recommended.reason, guidance.recommended.reason),
        fidelity=measures.mean_fidelity if measures.fidelity else None,
        agreement=measures.agreement,
        copying=measures.copying,
        num_images=len(guidance.drawings[setting].flat()),
    )


def compare(
    base_model: ModelLocation,
    concept: Concept,
    steps: KeptSteps,
    reference: Image.Image,
    params: EvaluationParams,
    device: DeviceParams,
    models: Mapping[str, Any],
) -> tuple[Comparison, Comparison]:
    """Compare the settings of a concept: strengths, and guidance scales by step.

    Args:
        base_model: its location.
        concept: trained on it.
        steps: kept concepts of its training.
        reference: the prepared image.
        params: of the evaluation.
        device: of the run.
        models: the arguments of `measuring.measure` that are models; the first image tower measures fidelity.
    """
    own_step = concept.metadata.last_step
    shown = shown_steps(list(steps), own_step, params.sweep.max_steps)
    embedder = next(iter(models["embedders"]), None)

    def draw(settings: Sequence[Setting | None]) -> dict[Setting | None, Drawings]:
        log.info("Drawing %d images of %d settings.", len(settings) * _images_per_setting(params), len(settings))
        return draw_settings(settings, base_model, concept, params, device, steps)

    def judge_of(base: Drawings) -> SettingJudge:
        return SettingJudge(
            reference, params.class_word, base, embedder, models["text_image"], models["color_agreement"]
        )

    return compare_settings(draw, judge_of, shown, own_step, adapted_branches(concept), params)


def _images_per_setting(params: EvaluationParams) -> int:
    return min(params.sweep.num_prompts, len(params.prompts)) * params.sweep.images


def adapted_branches(concept: Concept) -> Collection[str]:
    """Return the branches with an adapter; a shared one is of both."""
    found = concept.metadata.group_branches
    return {*BRANCH_NAMES} if SHARED in found else found
