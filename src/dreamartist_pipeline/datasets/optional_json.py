"""A JSON file that need not exist."""

from __future__ import annotations

from typing import Any

from kedro_datasets.json import JSONDataset


class OptionalJSONDataset(JSONDataset):  # type: ignore[misc]  # kedro-datasets loads it lazily, without its type
    """A JSON object; without a file it loads as an empty one. Arguments are those of `json.JSONDataset`."""

    def load(self) -> Any:
        """Return the object in the file, {} without a file."""
        return super().load() if super()._exists() else {}

    def _exists(self) -> bool:
        return True  # without a file there are no values
