"""Recognition of objects in images by the judge beside the embedded base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dreamartist_pipeline.backbones.evaluators import own_towers
from dreamartist_pipeline.core.images import to_tensor
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.embedded.datasets import JudgeDataset
from dreamartist_pipeline.embedded.judge import IMAGE_PX, NOTHING, Judge, judge_images


@dataclass(frozen=True)
class JudgeRecognizer:
    """The judge as a `core.measures.Recognizer`."""

    judge: Judge
    label = "judge"

    @property
    def known(self) -> Sequence[str]:
        """The objects of its vocabulary."""
        return self.judge.vocabulary.objects

    def objects_in(self, images: Sequence[Image.Image]) -> list[tuple[str, ...]]:
        """Return the objects that it names for each image: the left or upper one first, and the other if there is one.

        Images are resized to the judge's side.
        """
        side = (IMAGE_PX, IMAGE_PX)
        small = [image if image.size == side else image.resize(side, Image.Resampling.LANCZOS) for image in images]
        with torch.inference_mode():
            verdicts = judge_images(self.judge, to_tensor(small))
        return [
            tuple(word for word in (one.first_object, one.second_object) if word != NOTHING) or (NOTHING,)
            for one in verdicts
        ]


def own_judge(base_model: str | ModelLocation) -> Path | None:
    """Return the file of the judge in `judge` next to the embedded base model's folder; None for other base models."""
    towers = own_towers(base_model)
    file = None if towers is None else towers.with_name("judge") / "judge.safetensors"
    return file if file is not None and file.is_file() else None


def load_recognizer(base_model: str | ModelLocation) -> JudgeRecognizer | None:
    """Load the judge next to the embedded base model; None for other base models.

    Raises:
        DatasetError: the file is damaged.
    """
    file = own_judge(base_model)
    return None if file is None else JudgeRecognizer(JudgeDataset(filepath=file.as_posix()).load())
