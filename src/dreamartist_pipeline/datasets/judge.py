"""The judge as one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset, DatasetError

from dreamartist_pipeline.datasets.whole_files import written_whole

if TYPE_CHECKING:
    from dreamartist_pipeline.core.judge import Judge

FORMAT = "dreamartist-judge/1"
_HEADER = "judge"  # one entry, so that the same judge gives the same bytes


class JudgeDataset(AbstractDataset["Judge", "Judge"]):
    """A Judge as one safetensors file: weights in float16, vocabulary and channels in the header.

    Loads frozen, in float32 and eval mode.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Judge:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._filepath, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
                weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError) as error:
            raise DatasetError(
                f"expected the judge at {self._filepath}, got: {error}; run `make judge`, which trains it"
            ) from error
        if header.get("format") != FORMAT:
            raise DatasetError(
                f"expected a judge of the format {FORMAT} at {self._filepath}, got {header.get('format')}; "
                "run `make judge`, which trains it"
            )
        return _build(header, weights)

    def save(self, data: Judge) -> None:
        import torch
        from safetensors.torch import save_file

        header = {
            "format": FORMAT,
            "objects": data.vocabulary.objects,
            "styles": data.vocabulary.styles,
            "channels": data.channels,
        }
        weights = {name: value.to(torch.float16).contiguous() for name, value in data.state_dict().items()}
        with written_whole(self._filepath) as temporary:
            save_file(weights, temporary, metadata={_HEADER: json.dumps(header)})

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}


def _build(header: dict[str, Any], weights: dict[str, Any]) -> Judge:
    from dreamartist_pipeline.core.judge import Judge, JudgeVocabulary

    vocabulary = JudgeVocabulary(tuple(header["objects"]), tuple(header["styles"]))
    judge = Judge(vocabulary, header["channels"])
    judge.load_state_dict(weights)
    return judge.eval().requires_grad_(False)
