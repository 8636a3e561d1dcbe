"""The export pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.export.nodes import check_files, write_files


def create_pipeline() -> Pipeline:
    """Write the files, and store them only if they are read back as the same concept."""
    return Pipeline(
        [
            node(
                write_files,
                inputs={
                    "base_model": "base_model",
                    "concept": "concept",
                    "params": "params:export",
                    "recommended_settings": "recommended_settings",
                    "concept_steps": "concept_steps",
                },
                outputs="export_candidate",
                name="write_files",
                tags="export",
            ),
            node(
                check_files,
                inputs={
                    "base_model": "base_model",
                    "concept": "concept",
                    "candidate": "export_candidate",
                    "params": "params:export",
                    "recommended_settings": "recommended_settings",
                    "concept_steps": "concept_steps",
                },
                outputs=["exported_files", "export_report"],
                name="check_files",
                tags="export",
            ),
        ]
    )
