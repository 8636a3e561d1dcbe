"""Which strengths and guidance scale are recommended for a concept: the settings that are compared, and the rule.

A value is recommended only if pictures were drawn with it and measured.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dreamartist_pipeline.core.choosing import least_agreement
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.decoding.json_text import reasons
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ExportParams, GenerateParams, Guidance, StrengthParams, SweepParams

log = logging.getLogger(__name__)

_EVALUATE = "run kedro run --pipeline evaluate with evaluation.sweep.images of at least 1"
_Section = TypeVar("_Section", GenerateParams, ExportParams)


@dataclass(frozen=True)
class Setting:
    """Values that pictures are drawn with.

    Attributes:
        positive: strength of the positive adapter.
        negative: strength of the negative adapter.
        guidance_scale: s.
        step: of the training, of a kept concept; None: the concept itself.
    """

    positive: float
    negative: float
    guidance_scale: float
    step: int | None = None

    @property
    def strength(self) -> StrengthParams:
        """Both strengths."""
        return StrengthParams(positive=self.positive, negative=self.negative)

    def distance(self, other: Setting) -> float:
        """Return how far two settings are apart: the sum of the strengths' differences and of guidance in octaves."""
        strengths = abs(self.positive - other.positive) + abs(self.negative - other.negative)
        return strengths + abs(math.log2(self.guidance_scale / other.guidance_scale))


@dataclass(frozen=True)
class SettingMeasures:
    """Measures of the pictures of a setting.

    Attributes:
        fidelity: of each picture, of the same prompts and seeds in every setting; () without an image tower.
        agreement: mean, or None if it is not measured.
        copying: mean of `metrics.copying_share`, or None without an image tower.
    """

    fidelity: tuple[float, ...]
    agreement: float | None
    copying: float | None

    @property
    def mean_fidelity(self) -> float:
        """The mean over the pictures; NaN without an image tower."""
        return statistics.fmean(self.fidelity) if self.fidelity else math.nan


@dataclass(frozen=True)
class SettingBounds:
    """What a recommended setting has to keep.

    Attributes:
        agreement: at least; None: not measured.
        copying: at most.
    """

    agreement: float | None
    copying: float

    @classmethod
    def of(cls, params: SweepParams, base_agreement: float | None) -> SettingBounds:
        """Return the bounds, relative to the agreement of the base model with the class word."""
        return cls(least_agreement(base_agreement, params.agreement_loss), params.max_copying)

    def keeps(self, measures: SettingMeasures) -> bool:
        """Return whether the measures are within the bounds."""
        agrees = self.agreement is None or (measures.agreement is not None and measures.agreement >= self.agreement)
        return agrees and (measures.copying is None or measures.copying <= self.copying)

    def __str__(self) -> str:
        """Return the bounds as text."""
        agreement = "" if self.agreement is None else f"agreement of at least {self.agreement:.2f}, "
        return f"{agreement}copying of at most {self.copying:g}"


@dataclass(frozen=True)
class Recommendation:
    """A recommended setting.

    Attributes:
        setting: one that was measured.
        reason: without a full stop.
    """

    setting: Setting
    reason: str


def recommend(
    measured: Mapping[Setting, SettingMeasures], usual: Setting, bounds: SettingBounds, what: str
) -> Recommendation:
    """Recommend one of the measured settings.

    The highest mean fidelity within the bounds. Settings whose fidelity is lower by at most one standard error, of the
    differences of pictures of the same prompt and seed, count as equal (the one-standard-error rule of Breiman et al.
    1984), and the one nearest to the usual setting is taken. Without fidelity, or if no setting is within the bounds,
    the usual one; without agreement, where the highest fidelity is that of a copy, the nearest to it within the bounds.

    Args:
        measured: settings with their measures, among them the usual one.
        usual: the configured setting.
        bounds: of the recommended one.
        what: varies in the settings, for the reason.
    """
    within = {setting: one for setting, one in measured.items() if bounds.keeps(one)}
    if not measured[usual].fidelity:
        return Recommendation(usual, f"{what}: as configured, because fidelity is not measured")
    if not within:
        return Recommendation(usual, f"{what}: as configured, because none is within the bounds ({bounds})")
    if bounds.agreement is None:
        nearest = min(within, key=usual.distance)
        return Recommendation(
            nearest, f"{what}: nearest to the configured one within the bounds ({bounds}); agreement is not measured"
        )
    best = max(within, key=lambda setting: within[setting].mean_fidelity)
    equal = [setting for setting in within if _is_equal(within[setting].fidelity, within[best].fidelity)]
    chosen = min(equal, key=usual.distance)
    highest = f"the highest fidelity within the bounds ({bounds}), {within[best].mean_fidelity:.3f}"
    if chosen == best:
        return Recommendation(chosen, f"{what}: {highest}")
    lower = f"{within[chosen].mean_fidelity:.3f}, within a standard error of {highest}"
    return Recommendation(chosen, f"{what}: nearest to the configured one of {len(equal)} settings: {lower}")


def _is_equal(values: Sequence[float], best: Sequence[float]) -> bool:
    """Return whether the mean of paired differences is at most their standard error."""
    differences = [high - low for low, high in zip(values, best, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.fmean(differences) <= error


# ------------------------------------------------------------------------------------------------- stored values


class RecommendedSettings(BaseModel):
    """The values that an evaluation recommends for a concept, as stored beside it.

    Attributes:
        strength: of the adapters.
        guidance_scale: s.
        concept_sha256: `Concept.sha256` of the concept that was measured.
        reasons: of the strengths and of the guidance scale.
        fidelity, agreement, copying: of these values; None if not measured.
        num_images: that these measures are of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strength: StrengthParams
    guidance_scale: Guidance
    concept_sha256: str
    reasons: tuple[str, ...]
    fidelity: float | None
    agreement: float | None
    copying: float | None
    num_images: int

    @classmethod
    def read(cls, values: Mapping[str, Any] | None, concept: Concept) -> RecommendedSettings | None:
        """Return stored values; None if there are none, or if they are of another concept.

        Raises:
            InputError: invalid values.
        """
        if not values:
            return None
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            raise InputError(
                expected="the recommended settings of an evaluation in recommended_settings.json",
                got=reasons(error),
                remedy=f"remove the file, or {_EVALUATE}",
            ) from error
        return settings if settings.concept_sha256 == concept.sha256() else None

    def __str__(self) -> str:
        """Return the values as text."""
        return f"strength {self.strength}, guidance scale {self.guidance_scale:g}"


def with_recommended(params: _Section, settings: RecommendedSettings | None, section: str) -> _Section:
    """Return the section with the recommended values if it asks for them.

    Args:
        params: of a section.
        settings: of its concept.
        section: its name.

    Raises:
        InputError: it asks for them, and there are none.
    """
    if not params.recommended:
        return params
    if settings is None:
        raise InputError(
            expected=f"recommended settings of this concept, for {section}.recommended",
            got="none, or those of another concept",
            remedy=_EVALUATE,
        )
    log.info("The recommended settings are used: %s.", settings)
    sampler = params.sampler.model_copy(update={"guidance_scale": settings.guidance_scale})
    return params.model_copy(update={"strength": settings.strength, "sampler": sampler})
