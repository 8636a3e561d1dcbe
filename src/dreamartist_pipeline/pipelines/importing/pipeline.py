"""The import pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.importing.nodes import import_concept


def create_pipeline() -> Pipeline:
    """Convert files of other tools to a concept, with a report."""
    return Pipeline(
        [
            node(
                import_concept,
                inputs={
                    "base_model": "base_model",
                    "import_files": "import_files",
                    "toolkit_files": "toolkit_files",
                    "params": "params:import",
                },
                outputs=["concept", "import_report"],
                name="import_concept",
                tags="import",
            )
        ]
    )
