"""Wiring of the import stage."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.importing.nodes import import_concept


def create_pipeline() -> Pipeline:
    """A concept from files of other tools, and which files these were."""
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
