"""What an exported file's metadata say about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FileFacts:
    """A file in words.

    trigger_phrase: what users type; "" without one. prediction_type: "epsilon" or "v_prediction".
    is_v2: whether the base model has Stable Diffusion 2's text encoder.
    """

    title: str
    trigger_phrase: str
    prediction_type: str
    is_v2: bool

    @property
    def architecture(self) -> str:
        """The base model's architecture as modelspec names it."""
        return "stable-diffusion-v2" if self.is_v2 else "stable-diffusion-v1"

    def modelspec(self, kind: str) -> dict[str, str]:
        """Return the modelspec.* entries; kind is "lora" or "textual-inversion"."""
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{self.architecture}/{kind}",
            "modelspec.title": self.title,
            "modelspec.trigger_phrase": self.trigger_phrase,
            "modelspec.prediction_type": "v" if self.prediction_type == "v_prediction" else "epsilon",
        }
