"""A base model is the same however it is held: its weights, its fingerprint, a step and a picture."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file
from transformers.initialization import no_init_weights

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone, load_outline
from dreamartist_pipeline.backbones.concepts import attach, generate
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.holding.checkpoint_kinds import kind_of
from dreamartist_pipeline.backbones.holding.clip_vocabulary import clip_tokenizer
from dreamartist_pipeline.backbones.holding.folder import weight_files
from dreamartist_pipeline.backbones.holding.parts import make_module
from dreamartist_pipeline.backbones.holding.single_file import shipped_configs
from dreamartist_pipeline.backbones.prompts import PromptEncoder
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams
from refusals import says
from single_files import original_autoencoder, single_file_tensors, write_single_file
from tiny_models import BUILDERS

CPU = DeviceParams(device="cpu")
HALF = DeviceParams(device="cpu", dtype="bfloat16")
SHARD, OLD_SHARD = "model.fp16-0000{}-of-00002.safetensors", "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors"
WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=list(BUILDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each kind, whose weights are the same in float16."""
    folder = BUILDERS[request.param](tmp_path_factory.mktemp("holding") / request.param)
    for file in folder.rglob("*.safetensors"):
        save_file({name: t.half().float() for name, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


def parts_of(folder: Path) -> list[Path]:
    return [folder / part for part in WEIGHTS if (folder / part).is_dir()]


# ------------------------------------------------------------------------------------------------- ways of holding


def single_file(folder: Path, place: Path) -> ModelLocation:
    return ModelLocation(str(write_single_file(folder, place / "model.safetensors")), config=str(folder))


def half_single_file(folder: Path, place: Path) -> ModelLocation:
    file = write_single_file(folder, place / "m.safetensors", dtype=torch.float16)
    return ModelLocation(str(file), config=str(folder))


def checkpoint_with_averaged_weights(folder: Path, place: Path) -> ModelLocation:
    return ModelLocation(str(write_single_file(folder, place / "model.ckpt", ema=True)), config=str(folder))


def file_with_its_autoencoder_apart(folder: Path, place: Path) -> ModelLocation:
    file = write_single_file(folder, place / "m.safetensors", leave_out=("first_stage_model.",))
    vae = place / "vae.safetensors"
    save_file({name: t.contiguous() for name, t in original_autoencoder(folder / "vae").items()}, vae)
    return ModelLocation(str(file), str(vae), str(folder))


def half_variants(folder: Path, place: Path) -> ModelLocation:
    copy = shutil.copytree(folder, place / "copy")
    for file in [file for part in parts_of(copy) for file in part.glob("*.safetensors")]:
        tensors = {name: t.half() for name, t in load_file(file).items()}
        save_file(tensors, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    return ModelLocation(str(copy))


def shards(folder: Path, place: Path) -> ModelLocation:
    copy = shutil.copytree(folder, place / "copy")
    for file in [file for part in parts_of(copy) for file in part.glob("*.safetensors")]:
        names = list(tensors := load_file(file))
        for number, chosen in enumerate((names[::2], names[1::2]), start=1):
            shard = file.with_name(f"{file.stem}-0000{number}-of-00002.safetensors")
            save_file({name: tensors[name] for name in chosen}, shard)
        file.unlink()
    return ModelLocation(str(copy))


def pickled(folder: Path, place: Path) -> ModelLocation:
    copy = shutil.copytree(folder, place / "copy")
    for file in [file for part in parts_of(copy) for file in part.glob("*.safetensors")]:
        stem = "diffusion_pytorch_model" if file.stem.startswith("diffusion") else "pytorch_model"
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    return ModelLocation(str(copy))


def hub_cache(folder: Path, place: Path) -> ModelLocation:
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = place / "models--owner--name"
    shutil.copytree(folder, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return ModelLocation(str(root))


def autoencoder_in_a_folder(folder: Path, place: Path) -> ModelLocation:
    copy = shutil.copytree(folder, place / "copy", ignore=shutil.ignore_patterns("vae"))
    return ModelLocation(str(copy), str(folder / "vae"))


WAYS = (
    single_file,
    half_single_file,
    checkpoint_with_averaged_weights,
    file_with_its_autoencoder_apart,
    half_variants,
    shards,
    pickled,
    hub_cache,
    autoencoder_in_a_folder,
)


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[str, bytes, torch.Tensor]:
    files = BaseModelFiles(folder)
    backbone = load_backbone(files, CPU)
    return files.fingerprint(), picture(backbone), step(backbone)


@pytest.mark.parametrize("hold", WAYS)
def test_a_model_is_the_same_however_it_is_held(
    folder: Path,
    tmp_path: Path,
    expected: tuple[str, bytes, torch.Tensor],
    hold: Callable[[Path, Path], ModelLocation],
) -> None:
    files = BaseModelFiles(hold(folder, tmp_path))
    backbone = load_backbone(files, CPU)
    assert files.fingerprint() == backbone.fingerprint == expected[0]
    assert picture(backbone) == expected[1]
    assert torch.equal(step(backbone), expected[2])


def picture(backbone: Backbone) -> bytes:
    sampler = SamplerParams(scheduler="ddim", num_inference_steps=1)
    loaded = attach(backbone, None, StrengthParams())
    return generate(backbone, loaded, ["a red cat"], "", [0], sampler)[0].tobytes()


def step(backbone: Backbone) -> torch.Tensor:
    """Return the gradient of a loss by the latents."""
    encoder = PromptEncoder(backbone)
    conditioning = encoder.encode(encoder.tokenize(["a blue dog"]))
    latents = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8).requires_grad_()
    backbone.denoise(latents, torch.tensor([500]), conditioning).square().mean().backward()
    assert latents.grad is not None
    return latents.grad


# ------------------------------------------------------------------------------------------------- what a file is


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what builds a tiny model by its kind, once."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def build(kind: str) -> Path:
        return BUILDERS[kind](root / kind)

    return build


def check(location: ModelLocation | Path) -> None:
    load_outline(BaseModelFiles(location))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", "a LoRA"),
        ("emb_params", "an embedding"),
        ("string_to_param:*", "an embedding"),
        ("clip_g", "an embedding"),
        ("encoder.conv_in.weight", "an autoencoder"),
        ("first_stage_model.decoder.conv_in.weight", "an autoencoder"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("clip_txt_mapper.weight", "Stable Cascade"),
        ("blocks.0.cross_attn.kv_linear.weight", "PixArt"),
        ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias", "HunyuanVideo"),
        ("model.diffusion_model.head.modulation", "Wan"),
        ("model.diffusion_model.cap_embedder.0.weight", "Lumina"),
        ("conditioner.embedders.0.model.text_projection", "the SDXL refiner"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a UNet without text encoders"),
        ("conv_in.weight", "the UNet of a folder in diffusers' layout"),
        ("model_ema.diffusion_modeltime_embed0weight", "EMA weights"),
        ("text_model.encoder.layers.0.layer_norm1.bias", "a text encoder"),
        ("something.else", "unknown keys: something.else"),
    ],
)
def test_other_files_are_named(tmp_path: Path, key: str, what: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(1)}, file)
    with pytest.raises(InputError, check=says(expected=str(file), got=what)):
        check(file)


def test_an_embedding_pickled_by_torch_is_named(tmp_path: Path) -> None:
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 8)}}, tmp_path / "cat.pt")
    with pytest.raises(InputError, check=says(got="an embedding", remedy="import")):
        check(tmp_path / "cat.pt")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "an empty file"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!doctype html><html>", "a web page"),
        (b"PK\x03\x04 damaged", "a damaged"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, got: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, check=says(expected="model.safetensors", got=got)):
        check(file)


def first_names(folder: Path, file: Path) -> None:
    tensors = single_file_tensors(folder)
    old = {name.replace(".transformer.text_model.", ".transformer."): t.contiguous() for name, t in tensors.items()}
    save_file(old, file)


def first_format(folder: Path, file: Path) -> None:
    torch.save(single_file_tensors(folder), file, _use_new_zipfile_serialization=False)


def with_a_trainers_callbacks(folder: Path, file: Path) -> None:
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    with patch.dict(
        sys.modules, dict.fromkeys(("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__), module)
    ):
        torch.save(
            {"state_dict": single_file_tensors(folder), "callbacks": {module.ModelCheckpoint: {"step": 1}}}, file
        )


@pytest.mark.parametrize("write", [first_names, first_format, with_a_trainers_callbacks])
def test_files_of_early_tools_open(
    models: Callable[[str], Path], tmp_path: Path, write: Callable[[Path, Path], None]
) -> None:
    write(models("sd1"), tmp_path / "model")
    files = BaseModelFiles(ModelLocation(str(tmp_path / "model"), config=str(models("sd1"))))
    files.check()
    assert files.fingerprint() == BaseModelFiles(models("sd1")).fingerprint()


class RunsCode:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("code runs",)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": RunsCode()}, tmp_path / "model.ckpt")
    with pytest.raises(InputError, check=says(expected="model.ckpt", got="print")):
        check(tmp_path / "model.ckpt")
    assert "code runs" not in capsys.readouterr().out


def test_a_truncated_file_is_named(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_single_file(models("sd1"), tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, check=says(expected="model.safetensors", got="truncated")):
        check(ModelLocation(str(file), config=str(models("sd1"))))


@pytest.mark.parametrize(
    ("leave_out", "ema", "got", "remedy"),
    [
        (("first_stage_model.",), False, "without autoencoder", "vae"),
        (("model.diffusion_model.",), True, "EMA", "weights"),
        (("model.diffusion_model.",), False, "without unet", "whole"),
        (("model.diffusion_model.middle_block.1.",), False, "no mid_block.attentions.0", "base_model_config"),
    ],
)
def test_what_a_file_lacks_is_named(
    models: Callable[[str], Path], tmp_path: Path, leave_out: tuple[str, ...], ema: bool, got: str, remedy: str
) -> None:
    file = write_single_file(models("sd1"), tmp_path / "model.safetensors", leave_out=leave_out, ema=ema)
    with pytest.raises(InputError, check=says(expected=str(file), got=got, remedy=remedy)):
        check(ModelLocation(str(file), config=str(models("sd1"))))


def test_a_file_of_unusual_size_needs_its_configurations(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_single_file(models("sdxl"), tmp_path / "model.safetensors")
    with pytest.raises(InputError, check=says(expected=str(file), got="in place of", remedy="base_model_config")):
        check(file)


def test_an_inpainting_model_is_refused_before_its_weights_are_read(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}
    file = write_single_file(models("sd1"), tmp_path / "model.safetensors", more=first)
    with pytest.raises(InputError, check=says(expected="4 input channels", got="9 input channels")):
        check(ModelLocation(str(file), config=str(models("sd1"))))


def test_configurations_are_for_single_files(models: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, check=says(expected="base_model_config", got=str(models("sd1")))):
        check(ModelLocation(str(models("sd1")), config=str(models("sd1"))))


# ------------------------------------------------------------------------------------------------- configurations


def schedule(file: Path) -> tuple[str, bool]:
    config = BaseModelFiles(file).parts().config("scheduler")
    return config["prediction_type"], config.get("rescale_betas_zero_snr", False)


@pytest.mark.parametrize(
    ("keys", "metadata", "expected"),
    [
        ((), {}, ("epsilon", False)),
        (("v_pred",), {}, ("v_prediction", False)),
        (("v_pred", "ztsnr"), {}, ("v_prediction", True)),
        ((), {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        ((), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    ],
)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_prediction_type_is_what_the_file_says(
    models: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    keys: tuple[str, ...],
    metadata: dict[str, str],
    expected: tuple[str, bool],
) -> None:
    more = {key: torch.zeros(0) for key in keys}
    file = write_single_file(models(kind), tmp_path / "model.safetensors", more=more, metadata=metadata)
    assert schedule(file) == expected


@pytest.mark.parametrize(
    ("std", "metadata", "expected"),
    [
        (0.2, {}, "v_prediction"),
        (0.01, {}, "epsilon"),
        (0.2, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        (0.01, {"modelspec.prediction_type": "v"}, "v_prediction"),
    ],
)
def test_stable_diffusion_2_predicts_v_by_metadata_or_by_its_weights(
    models: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    std: float,
    metadata: dict[str, str],
    expected: str,
) -> None:
    sign = {
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": std * torch.tensor([1.0, -1, 1, -1])
    }
    file = write_single_file(models("sd2-v"), tmp_path / "m.safetensors", more=sign, metadata=metadata)
    with caplog.at_level(logging.INFO):
        assert schedule(file)[0] == expected
    assert "base_model_config=" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind", "num_tensors"),
    [
        ("sd1", "v1", (686, 248)),
        ("sd2-base", "v2", (686, 248)),
        ("sd2-v", "v2", (686, 248)),
        ("sdxl", "xl_base", (1680, 248)),
    ],
)
def test_shipped_configurations_are_those_of_the_published_models(
    name: str, kind: str, num_tensors: tuple[int, int]
) -> None:
    family = BaseModelFiles(shipped_configs(name)).family()
    kinds = {**family.network_classes, "vae": AutoencoderKL}

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        config = json.loads((folder / "config.json").read_text())
        with no_init_weights(), torch.device("meta"):
            module = make_module(kinds[folder.name], config)
        return dict(module.state_dict())

    tensors = single_file_tensors(shipped_configs(name), weights)
    prefixes = ("model.diffusion_model.", "first_stage_model.")
    assert tuple(sum(key.startswith(prefix) for key in tensors) for prefix in prefixes) == num_tensors
    assert infer_diffusers_model_type(tensors) == kind
    assert kind_of(tensors, "file").name == name.split("-", maxsplit=1)[0]


@pytest.mark.parametrize(("pad_token", "pad_id"), [("<|endoftext|>", 49407), ("!", 0)])
def test_the_shipped_vocabulary_is_clips(pad_token: str, pad_id: int) -> None:
    tokenizer = clip_tokenizer({"pad_token": pad_token, "model_max_length": 77})
    ids = tokenizer("A photo of a cat", padding="max_length", max_length=9).input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, pad_id, pad_id]  # as in CLIP's notebook and papers
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)


# ------------------------------------------------------------------------------------------------- autoencoders


def autoencoder(folder: Path, latent_channels: int) -> Path:
    module = AutoencoderKL.from_pretrained(folder / "vae")
    config = {**module.config, "latent_channels": latent_channels}
    place = folder.parent / f"vae_{latent_channels}"
    AutoencoderKL.from_config(config).save_pretrained(place)
    return place


@pytest.mark.parametrize("as_file", [True, False])
def test_an_autoencoder_of_other_latents_is_refused(
    models: Callable[[str], Path], tmp_path: Path, as_file: bool
) -> None:
    vae = autoencoder(models("sd1"), 16)
    if as_file:
        vae = vae / "diffusion_pytorch_model.safetensors"
    with pytest.raises(InputError, check=says(expected="4 latent channels", got="16 latent channels", remedy="vae")):
        check(ModelLocation(str(models("sd1")), str(vae)))


@pytest.mark.parametrize("names", ["diffusers", "original", "whole model"])
def test_another_autoencoder_is_used_and_counts_in_the_fingerprint(
    models: Callable[[str], Path], tmp_path: Path, names: str
) -> None:
    other, file = BUILDERS["sd1"](tmp_path / "other", seed=1), tmp_path / "vae.safetensors"
    if names == "diffusers":
        shutil.copy(other / "vae" / "diffusion_pytorch_model.safetensors", file)
    elif names == "original":
        save_file({name: t.contiguous() for name, t in original_autoencoder(other / "vae").items()}, file)
    else:
        write_single_file(other, file)
    location = ModelLocation(str(models("sd1")), str(file))
    backbone = load_backbone(BaseModelFiles(location), CPU)
    expected = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.autoencoder.state_dict().items())
    assert backbone.fingerprint != BaseModelFiles(models("sd1")).fingerprint()
    assert backbone.fingerprint == BaseModelFiles(ModelLocation(str(models("sd1")), str(other / "vae"))).fingerprint()
    assert backbone.name == "sd1 + vae.safetensors"


def test_a_file_without_autoencoder_is_no_autoencoder(models: Callable[[str], Path], tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(1, 8)}, tmp_path / "word.safetensors")
    with pytest.raises(InputError, check=says(expected="word.safetensors", got="emb_params", remedy="vae")):
        check(ModelLocation(str(models("sd1")), str(tmp_path / "word.safetensors")))


# ------------------------------------------------------------------------------------------------- folders


def test_of_two_precisions_a_run_reads_its_own_and_the_fingerprint_is_of_the_full_one(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(models("sd1"), tmp_path / "copy"))
    full = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.half() + 1 for n, t in load_file(full).items()}, full.with_suffix(".fp16.safetensors"))
    files = BaseModelFiles(copy)
    assert files.fingerprint() == BaseModelFiles(models("sd1")).fingerprint()
    bias = load_file(full)["conv_in.bias"]
    assert torch.equal(load_backbone(files, CPU).unet.conv_in.bias, bias)
    assert torch.equal(load_backbone(files, HALF).unet.conv_in.bias, (bias.half() + 1).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("names", "half", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], False, ["model.safetensors"]),
        (["pytorch_model.bin"], True, ["pytorch_model.bin"]),
        (["model.fp16.safetensors", "model.safetensors"], False, ["model.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], True, ["model.fp16.safetensors"]),
        (["model.fp16.safetensors"], False, ["model.fp16.safetensors"]),
        (["diffusion_pytorch_model.non_ema.bin", "pytorch_model.bin"], False, ["pytorch_model.bin"]),
        ([OLD_SHARD.format(1), OLD_SHARD.format(2)], True, [OLD_SHARD.format(1), OLD_SHARD.format(2)]),
        ([SHARD.format(1), SHARD.format(2)], False, [SHARD.format(1), SHARD.format(2)]),
        ([SHARD.format(1), SHARD.format(2), "model.safetensors"], False, ["model.safetensors"]),
        (["model.onnx", "flax_model.msgpack", "config.json"], False, []),
    ],
)
def test_weight_files_are_chosen_by_name(names: list[str], half: bool, chosen: list[str]) -> None:
    assert weight_files(names, half=half) == chosen


def test_a_missing_shard_is_named(models: Callable[[str], Path], tmp_path: Path) -> None:
    location = shards(models("sd1"), tmp_path)
    next((Path(location.path) / "unet").glob("*00002-of-00002*")).unlink()
    with pytest.raises(InputError, check=says(got="shards of unet/")):
        check(location)


def test_a_snapshot_is_named_after_its_repository(models: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(hub_cache(models("sd1"), tmp_path).path)
    (snapshot,) = (root / "snapshots").iterdir()
    assert {BaseModelFiles(place).name for place in (root, snapshot)} == {"owner/name"}
    shutil.copytree(snapshot, snapshot.with_name("ff" * 20))
    (root / "refs" / "main").unlink()
    with pytest.raises(InputError, check=says(expected=str(root), got=snapshot.name, remedy="snapshots")):
        check(root)


def test_a_file_that_changes_has_another_fingerprint(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_single_file(models("sd1"), tmp_path / "model.safetensors")
    files = BaseModelFiles(ModelLocation(str(file), config=str(models("sd1"))))
    before = files.fingerprint()
    write_single_file(models("sd1"), file, dtype=torch.bfloat16)
    assert files.fingerprint() != before
