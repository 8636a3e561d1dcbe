"""Remove the checkpoints of a finished training."""

from __future__ import annotations

from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline.node import Node

from dreamartist_pipeline.core.checkpoints import CONCEPT

_CHECKPOINTS = "training_checkpoints"


class CheckpointHooks:
    """Remove the checkpoints once all results of the training are saved, so that the same command starts anew."""

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Store the catalog."""
        self._catalog = catalog

    @hook_impl(trylast=True)
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """Remove them after the last output of the node that trains."""
        if _CHECKPOINTS in node.inputs and "concept" in node.outputs and dataset_name == node.outputs[-1]:
            self._catalog.load(_CHECKPOINTS).discard(CONCEPT)
