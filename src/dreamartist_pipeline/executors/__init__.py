"""Where runs that another run starts are executed: on this machine, or on those of a Ray cluster."""

from __future__ import annotations

from dreamartist_pipeline.executors.local import LocalWorkers
from dreamartist_pipeline.starting_runs import Executor, Workers


def executor_for(workers: Workers) -> Executor:
    """Return what executes runs.

    Raises:
        InputError: Ray is not installed, or there is no cluster at that address.
    """
    if workers.ray is None:
        return LocalWorkers(workers.count or 1)
    from dreamartist_pipeline.executors.ray_cluster import RayWorkers

    return RayWorkers(workers.ray, workers.count, workers.threads)
