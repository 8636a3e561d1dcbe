"""Sheets of compared settings."""

from __future__ import annotations

from PIL import Image

from dreamartist_pipeline.core.figures import SheetCell, setting_sheet
from dreamartist_pipeline.core.strengths import Setting
from dreamartist_pipeline.params import EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.strengths import Comparison


def draw_comparison(title: str, comparison: Comparison, params: EvaluationParams) -> Image.Image:
    """Draw a sheet: the pictures of every setting, its measures, and which one is configured and recommended."""
    cells = [[_cell(setting, comparison) for setting in row] for row in comparison.rows.values()]
    return setting_sheet(title, _lines(comparison, params), list(comparison.rows), comparison.columns, cells)


def _cell(setting: Setting, comparison: Comparison) -> SheetCell:
    measures = comparison.measures[setting]
    texts = []
    if measures.fidelity:
        texts.append(f"fidelity {measures.mean_fidelity:.3f}")
    if measures.agreement is not None:
        texts.append(f"agreement {measures.agreement:.2f}")
    if measures.copying is not None:
        texts.append(f"copying {measures.copying:.2f}")
    marks = {"configured": comparison.usual, "recommended": comparison.recommended.setting}
    return SheetCell(
        images=comparison.drawings[setting].flat(),
        texts=texts,
        mark=" and ".join(name for name, marked in marks.items() if marked == setting),
    )


def _lines(comparison: Comparison, params: EvaluationParams) -> list[str]:
    drawings = comparison.drawings[comparison.usual]
    prompts, seeds = "; ".join(drawings.prompts), ", ".join(map(str, drawings.seeds))
    sampler = params.sampler
    return [
        f"Each cell: {prompts}; seed {seeds}; {sampler.scheduler}, {sampler.num_inference_steps} steps.",
        f"Recommended for {comparison.recommended.reason}.",
    ]
