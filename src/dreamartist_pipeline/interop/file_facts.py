"""The metadata of exported files."""

from __future__ import annotations

from dataclasses import dataclass

from dreamartist_pipeline.core.layout import FileNames


@dataclass(frozen=True)
class FileFacts:
    """The description of an exported file.

    Attributes:
        trigger_phrase: its trigger words, or "".
        prediction_type: "epsilon" or "v_prediction".
        names: the names of the base model's parts in files.
        usage_hint: how to use it, or "".
    """

    title: str
    trigger_phrase: str
    prediction_type: str
    names: FileNames
    usage_hint: str = ""

    def modelspec(self, kind: str) -> dict[str, str]:
        """Return the modelspec.* entries; kind is "lora" or "textual-inversion"."""
        hint = {"modelspec.usage_hint": self.usage_hint} if self.usage_hint else {}
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{self.names.architecture}/{kind}",
            "modelspec.title": self.title,
            "modelspec.trigger_phrase": self.trigger_phrase,
            "modelspec.prediction_type": "v" if self.prediction_type == "v_prediction" else "epsilon",
            **hint,
        }
