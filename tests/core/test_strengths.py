"""The rule that recommends strengths and guidance scales, and the stored values."""

from __future__ import annotations

import pytest
import torch

from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.core.metrics import copying_share
from dreamartist_pipeline.core.strengths import (
    RecommendedSettings,
    Setting,
    SettingBounds,
    SettingMeasures,
    recommend,
    with_recommended,
)
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import GenerateParams, StrengthParams, SweepParams
from refusals import says

USUAL, HIGH, LOW = Setting(1.0, 1.0, 4.0), Setting(1.2, 1.0, 4.0), Setting(0.8, 1.0, 4.0)
BOUNDS = SettingBounds(agreement=0.6, copying=0.5)


def measures(*fidelity: float, agreement: float | None = 0.9, copying: float | None = 0.1) -> SettingMeasures:
    return SettingMeasures(fidelity, agreement, copying)


def test_the_highest_fidelity_is_recommended() -> None:
    found = recommend(
        {LOW: measures(0.5, 0.5), USUAL: measures(0.6, 0.6), HIGH: measures(0.8, 0.8)}, USUAL, BOUNDS, "x"
    )
    assert found.setting == HIGH
    assert "0.800" in found.reason


@pytest.mark.parametrize("beyond", [{"agreement": 0.5}, {"copying": 0.6}, {"agreement": None}])
def test_a_setting_beyond_a_bound_is_not_recommended(beyond: dict[str, float]) -> None:
    measured = {LOW: measures(0.5, 0.5), USUAL: measures(0.7, 0.7), HIGH: measures(0.9, 0.9, **beyond)}
    assert recommend(measured, USUAL, BOUNDS, "x").setting == USUAL


def test_of_settings_within_a_standard_error_the_nearest_to_the_configured_one_is_recommended() -> None:
    # differences 0.3 and -0.1: mean 0.1, standard error 0.2
    close = {LOW: measures(0.1, 0.1), USUAL: measures(0.6, 0.8), HIGH: measures(0.9, 0.7)}
    assert recommend(close, USUAL, BOUNDS, "x").setting == USUAL
    # differences 0.2 and 0.2: mean 0.2, standard error 0
    apart = {LOW: measures(0.1, 0.1), USUAL: measures(0.6, 0.8), HIGH: measures(0.8, 1.0)}
    assert recommend(apart, USUAL, BOUNDS, "x").setting == HIGH


def test_without_agreement_it_is_the_nearest_setting_that_does_not_copy() -> None:
    bounds = SettingBounds(None, 0.5)
    measured = {
        LOW: measures(0.5, agreement=None),
        USUAL: measures(0.7, agreement=None),
        HIGH: measures(0.9, agreement=None),
    }
    assert recommend(measured, USUAL, bounds, "x").setting == USUAL
    measured[USUAL] = measures(0.7, agreement=None, copying=0.8)
    measured[HIGH] = measures(0.9, agreement=None, copying=0.9)
    assert recommend(measured, USUAL, bounds, "x").setting == LOW


def test_it_is_the_configured_setting_without_fidelity_or_if_none_is_within_the_bounds() -> None:
    unmeasured = {USUAL: SettingMeasures((), 0.9, None), HIGH: SettingMeasures((), 0.9, None)}
    assert recommend(unmeasured, USUAL, BOUNDS, "x").setting == USUAL
    copies = {USUAL: measures(0.7, copying=0.8), HIGH: measures(0.9, copying=0.8)}
    assert recommend(copies, USUAL, BOUNDS, "x").setting == USUAL


def test_settings_are_apart_by_strengths_and_octaves_of_guidance() -> None:
    assert USUAL.distance(Setting(0.5, 0.75, 8.0)) == 0.5 + 0.25 + 1


def test_the_bound_of_agreement_is_relative_to_the_base_model() -> None:
    assert SettingBounds.of(SweepParams(agreement_loss=0.25, max_copying=0.4), 1.0) == SettingBounds(0.75, 0.4)
    assert SettingBounds.of(SweepParams(), None).agreement is None


def test_a_copy_is_near_to_a_crop_and_has_the_background() -> None:
    crop_distances, leakages = torch.tensor([0.0, 0.0, 0.4, 0.2, 0.8]), torch.tensor([1.0, 0.2, 1.0, 0.6, 0.2])
    found = copying_share(crop_distances, leakages, base_crop_distance=0.4, base_leakage=0.2)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0]))


# --------------------------------------------------------------------------------------------- stored values


def concept(value: float = 1.0) -> Concept:
    metadata = ConceptMetadata(
        base_model="tiny",
        base_model_fingerprint="",
        num_branches=2,
        num_steps=1,
        words={"pt1": ("my-fox", "my-fox-neg")},
        num_vectors=(1, 1),
        lora={"unet": ()},
    )
    return Concept({"words.positive.pt1": torch.full((1, 2), value)}, metadata)


def stored(of: Concept) -> dict[str, object]:
    settings = RecommendedSettings(
        strength=StrengthParams(positive=0.8, negative=0.5),
        guidance_scale=3.0,
        concept_sha256=of.sha256(),
        reasons=("strengths: …",),
        fidelity=0.8,
        agreement=0.9,
        copying=None,
        num_images=4,
    )
    return settings.model_dump(mode="json")


def test_stored_values_are_of_one_concept_only() -> None:
    settings = RecommendedSettings.read(stored(concept()), concept())
    assert settings is not None
    assert str(settings) == "strength 0.8 positive, 0.5 negative, guidance scale 3"
    assert RecommendedSettings.read(stored(concept()), concept(2.0)) is None
    assert RecommendedSettings.read({}, concept()) is None


@pytest.mark.parametrize("change", [{"guidance_scale": 0.0}, {"guidance_scale": None}, {"extra": 1}])
def test_invalid_stored_values_are_refused(change: dict[str, object]) -> None:
    name = next(iter(change))
    with pytest.raises(InputError, check=says(expected="recommended_settings.json", got=name)):
        RecommendedSettings.read(stored(concept()) | change, concept())


def test_values_replace_those_of_a_section_only_if_it_asks_for_them() -> None:
    settings = RecommendedSettings.read(stored(concept()), concept())
    params = GenerateParams(prompts="a {pt1}")
    assert with_recommended(params, settings, "generate") is params
    found = with_recommended(params.model_copy(update={"recommended": True}), settings, "generate")
    assert (found.strength, found.sampler.guidance_scale) == (StrengthParams(positive=0.8, negative=0.5), 3.0)
    assert found.sampler.num_inference_steps == params.sampler.num_inference_steps


def test_asking_for_values_that_do_not_exist_is_refused() -> None:
    params = GenerateParams(prompts="a {pt1}", recommended=True)
    with pytest.raises(InputError, check=says(expected="generate.recommended", remedy="--pipeline evaluate")):
        with_recommended(params, None, "generate")
