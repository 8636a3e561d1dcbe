"""A report of made-up values, with texts that are markup."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import pandas as pd
from PIL import Image

from dreamartist_pipeline.core.concept import ConceptMetadata
from dreamartist_pipeline.core.strengths import RecommendedSettings
from dreamartist_pipeline.interop.drawn_pictures import PictureEntry, write_pictures
from dreamartist_pipeline.params import StrengthParams
from dreamartist_pipeline.pipelines.report.contents import Sources, contents_of
from dreamartist_pipeline.pipelines.report.page import render
from dreamartist_pipeline.pipelines.training.figures import plot_history
from dreamartist_pipeline.run_facts import RunFacts

HOSTILE = "<script>alert('x')</script> \"&\" $x$ {{ 1 }}"
REMEDIES = {name: f"kedro run --pipeline {name} --params subject=fox" for name in ("train", "evaluate", "export")}
METADATA = ConceptMetadata(
    base_model="tiny",
    base_model_fingerprint="sha256:0011",
    num_branches=2,
    num_steps=60,
    words={"pt1": ("my-fox", "my-fox-neg")},
    num_vectors=(3, 6),
    lora={},
    class_word="fox",
    guidance_scale="3.0",
    picture_sha256="aa" * 32,
)
RECOMMENDED = RecommendedSettings(
    strength=StrengthParams(positive=0.8, negative=0.5),
    guidance_scale=3,
    concept_sha256="",
    reasons=(f"strengths: {HOSTILE}", "guidance scale: as configured"),
    fidelity=0.7,
    agreement=0.9,
    copying=0.1,
    num_images=4,
)
NAN = math.nan


def facts(**changes: Any) -> RunFacts:
    sheet = Image.new("RGB", (900, 200), "white")
    return dataclasses.replace(
        RunFacts(
            subject="fox",
            made="2026-01-02T03:04:05+00:00",
            command="kedro run --params 'training.num_steps=60'",
            configuration={"subject": "fox", "method": "dreamartist-plus-plus", "training.num_steps": 60, "mask": None},
            changed={"training.num_steps": (400, 60)},
            versions={"torch": "2.13"},
            machine={"processor": "x86"},
            files={"concept": "data/06_models/fox/concept.safetensors"},
            hashes={"concept": "ff" * 32},
            next=(("new images", "kedro run --pipeline generate"),),
            remedies=REMEDIES,
            previews=_png(sheet),
        ),
        **changes,
    )


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pictures(prompt: str = "a my-fox, blue background") -> dict[str, bytes]:
    """Return pictures of every kind: one prompt, two seeds."""
    kinds = [("subject", "base", ""), ("subject", "concept", ""), ("prior", "base", ""), ("prior", "concept", "")]
    kinds += [("branch", group, "negative_adapter") for group in ("with", "without")]
    kinds += [("guidance", "concept", scale) for scale in ("2", "4")]
    entries = [
        PictureEntry(kind=kind, group=group, condition=condition, prompt=prompt, seed=seed)
        for kind, group, condition in kinds
        for seed in (1, 2)
    ]
    return write_pictures([(one, Image.new("RGB", (32, 32), (9 * i, 60, 200))) for i, one in enumerate(entries)])


def attention(prompt: str = "a my-fox, blue background") -> dict[str, bytes]:
    """Return pictures of base model and concept with maps: one prompt, one seed."""
    shown = [("base", ""), ("base", "positive: 0 to 5%"), ("concept", ""), ("concept", "positive: 0 to 20%")]
    shown += [("concept", "negative: 0 to 3%")]
    entries = [
        PictureEntry(kind="attention", group=group, condition=condition, prompt=prompt, seed=1)
        for group, condition in shown
    ]
    return write_pictures([(one, Image.new("RGB", (32, 32), (9 * i, 90, 20))) for i, one in enumerate(entries)])


def measures() -> pd.DataFrame:
    """Return measures that differ from the floor, overlap it, have no interval of it, or are left out."""
    rows: list[dict[str, Any]] = [
        _measure("similarity", "fidelity, object alone", (0.7, 0.65, 0.75), (0.4, 0.35, 0.45), by="tower", ceiling=0.8),
        _measure("recognition", "recognition", (0.5, 0.4, 0.6), (0.55, 0.45, 0.65), unit="share", by="judge"),
        _measure("prior_drift", "prior drift", (0.3, 0.2, 0.4), (0.0, 0.0, 0.0), unit="distance", better="lower"),
        _measure("effect/similarity", "effect", (0.1, 0.05, 0.2), (0.0, NAN, NAN), condition="negative_adapter"),
        _measure("guidance/similarity", "by scale", (0.1, 0.0, 0.2), (0.0, NAN, NAN), condition="2"),
        _measure("similarity_unseen", "unseen", (NAN,) * 3, (NAN,) * 3, left_out=f"no views {HOSTILE}"),
    ]
    return pd.DataFrame(rows)


def _measure(
    name: str,
    title: str,
    concept: tuple[float, ...],
    base: tuple[float, ...],
    *,
    unit: str = "cosine",
    better: str = "higher",
    by: Any = NAN,
    condition: Any = NAN,
    ceiling: float = NAN,
    left_out: Any = NAN,
) -> dict[str, Any]:
    ends = ("", "_low", "_high")
    groups = (("concept", concept), ("base", base))
    values = {f"{group}{end}": of[index] for group, of in groups for index, end in enumerate(ends)}
    return {
        **{"measure": name, "condition": condition, "by": by, "title": title, "better": better, "unit": unit},
        **{**values, "reference": 1.0, "ceiling": ceiling, "images": 4, "left_out": left_out},
    }


def history() -> pd.DataFrame:
    steps = range(1, 31)
    return pd.DataFrame(
        {
            "step": list(steps),
            "loss_reference": [1 / step for step in steps],
            "loss_regularization": [0.5 for _ in steps],
            "guidance_scale": [3.0 for _ in steps],
            "lr/unet.0.positive": [1e-3 for _ in steps],
            "lr/unet.1.negative": [1e-4 for _ in steps],
            "grad_norm/positive/unet": [0.1 * step for step in steps],
        }
    )


def sources(**changes: Any) -> Sources:
    """Return everything that a report can have."""
    return dataclasses.replace(
        Sources(
            metadata=METADATA,
            facts=facts(),
            prepared_image=Image.new("RGB", (64, 64), "orange"),
            reconstruction=Image.new("RGB", (128, 64), "orange"),
            plan={"caption": "white background"},
            curves=plot_history(history()),
            measures=measures(),
            pictures=pictures(),
            strengths_sheet=Image.new("RGB", (760, 400), "white"),
            guidance_sheet=Image.new("RGB", (760, 300), "white"),
            recommended=RECOMMENDED,
            attention=attention(),
            export={"files": {"lora/fox.safetensors": {"bytes": 12_345, "sha256": "00"}}},
        ),
        **changes,
    )


def page(**changes: Any) -> str:
    """Return the page of `sources`."""
    return render(contents_of(sources(**changes)))
