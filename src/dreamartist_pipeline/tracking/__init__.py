"""MLflow: what nodes record in it, and how it is delivered."""

from dreamartist_pipeline.tracking.tracker import MLflowTracker, metric_name

__all__ = ["MLflowTracker", "metric_name"]
