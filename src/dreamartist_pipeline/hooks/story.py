"""The runs of one concept in MLflow: which run made it, and what a run's description shows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from dreamartist_pipeline.hooks.run import path_of
from dreamartist_pipeline.tracking.stores import logged_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CONCEPT_TAG = "concept_sha256"
"""Tag of the run that made a concept: SHA-256 of its file. Runs that use the concept have that run as parent."""
_PICTURES = {  # dataset -> heading in the description
    "contact_sheet": "Contact sheet",
    "generated_grid": "Images",
}
PREVIEWS = "training/previews.png"
"""Path of the sheet of previews in a run."""


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def run_that_made(client: MlflowClient, experiment_id: str, concept: Path) -> Run | None:
    """Return the newest run of an experiment that made this concept, if there is one."""
    query = f"tags.{CONCEPT_TAG} = '{file_sha256(concept)}'"
    runs = client.search_runs([experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1)
    return runs[0] if runs else None


def used_concept(pipeline: Pipeline, catalog: DataCatalog) -> Path | None:
    """Return the file of the concept that a run uses; None for a run that makes it, or needs none."""
    return path_of(catalog, "concept") if "concept" in pipeline.inputs() else None


def pictures_of(run_id: str, pipeline: Pipeline, catalog: DataCatalog) -> dict[str, str]:
    """Return heading -> Markdown of each picture that a run has logged."""
    files = {}
    for name, heading in _PICTURES.items():
        if name in pipeline.all_outputs() and (path := path_of(catalog, name)) is not None:
            dataset: Any = catalog[name]
            files[heading] = f"{dataset.artifact_path}/{path.name}"
    if PREVIEWS in logged_files(run_id):
        files["Previews by step"] = PREVIEWS
    return {heading: f"![{heading}](get-artifact?path={file}&run_uuid={run_id})" for heading, file in files.items()}


def with_sections(note: str, sections: Mapping[str, str]) -> str:
    """Return a description with these sections first; those of the same heading are replaced, other text is kept."""
    parts = note.split("\n\n## ")
    kept = [parts[0], *(part for part in parts[1:] if part.split("\n")[0] not in sections)]
    return "\n\n## ".join([kept[0], *(f"{heading}\n\n{body}" for heading, body in sections.items()), *kept[1:]])
