"""Remove the checkpoints of a finished training."""

from __future__ import annotations

from pathlib import Path

from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline.node import Node

from dreamartist_pipeline.checkpoint_files import CheckpointStore
from dreamartist_pipeline.core.checkpoints import CONCEPT

_PARAMETERS = "params:training"


class CheckpointHooks:
    """Remove the checkpoints once all results of the training are saved, so that the same command starts anew."""

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Store the catalog."""
        self._catalog = catalog

    @hook_impl(trylast=True)
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """Remove them after the last output of the node that trains."""
        trains = _PARAMETERS in node.inputs and "concept" in node.outputs
        if trains and dataset_name == node.outputs[-1] and (folder := self._catalog.load(_PARAMETERS).checkpoints):
            CheckpointStore(Path(folder)).discard(CONCEPT)
