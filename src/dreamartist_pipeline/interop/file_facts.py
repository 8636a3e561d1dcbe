"""What an exported file's metadata say about it."""

from __future__ import annotations

from dataclasses import dataclass

from dreamartist_pipeline.core.layout import FileNames


@dataclass(frozen=True)
class FileFacts:
    """A file in words.

    trigger_phrase: what users type; "" without one. prediction_type: "epsilon" or "v_prediction".
    names: what the file calls the base model's parts.
    """

    title: str
    trigger_phrase: str
    prediction_type: str
    names: FileNames

    def modelspec(self, kind: str) -> dict[str, str]:
        """Return the modelspec.* entries; kind is "lora" or "textual-inversion"."""
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{self.names.architecture}/{kind}",
            "modelspec.title": self.title,
            "modelspec.trigger_phrase": self.trigger_phrase,
            "modelspec.prediction_type": "v" if self.prediction_type == "v_prediction" else "epsilon",
        }
