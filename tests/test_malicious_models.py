"""Files made to run code, to read other files, or to take all memory or time: refused, or read as plain data."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.evaluators import load_evaluator
from dreamartist_pipeline.core.concept import ConceptMetadata
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.concept_file import read_concept
from dreamartist_pipeline.interop.safetensors_bytes import write_tensors
from dreamartist_pipeline.interop.word_files import read_embedding
from dreamartist_pipeline.params import DeviceParams

LIMIT_S = 5.0
VECTORS = torch.ones(2, 32)


@dataclass
class Trap:
    """Where a malicious file would leave a trace.

    Attributes:
        folder: a base model of its own, to be damaged.
        towers: a CLIP model of its own.
        canary: made by code that runs.
        secret: a file outside of the folder.
        opened: paths of files that were opened.
    """

    folder: Path
    towers: Path
    canary: Path
    secret: Path
    opened: list[str] = field(default_factory=list)

    @property
    def code(self) -> str:
        """Python that makes the canary."""
        return f"open({str(self.canary)!r}, 'w').close()\n"


_LISTENERS: list[list[str]] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        for opened in _LISTENERS:
            opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_listen)


@pytest.fixture
def trap(tmp_path: Path, tiny_base_model: Path) -> Iterator[Trap]:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    towers = {"text_config": {**sizes, "vocab_size": 20}, "vision_config": {**sizes, "image_size": 8, "patch_size": 4}}
    folder = Path(shutil.copytree(tiny_base_model, tmp_path / "inside" / "model"))
    CLIPModel(CLIPConfig(**towers, projection_dim=8)).save_pretrained(tmp_path / "inside" / "towers")
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "hunter2"}')
    made = Trap(folder, tmp_path / "inside" / "towers", tmp_path / "canary", secret)
    _LISTENERS.append(made.opened)
    yield made
    _LISTENERS.remove(made.opened)


def saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def with_pickle(pickled: bytes, **more: bytes) -> bytes:
    """Return a zip file as of torch.save with other instructions."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


Read = Callable[[], object]
Make = Callable[[Trap], Read]
CASES: dict[str, Make] = {}
HARMLESS: dict[str, Make] = {}


def case(make: Make) -> Make:
    CASES[make.__name__] = make
    return make


def harmless(make: Make) -> Make:
    HARMLESS[make.__name__] = make
    return make


def open_model(trap: Trap) -> Read:
    return lambda: load_backbone(BaseModelFiles(trap.folder), DeviceParams(device="cpu", dtype="float32"))


# ------------------------------------------------------------------------------------------ code in pickled files


@case
def an_embedding_that_calls_os_system(trap: Trap) -> Read:
    return lambda: read_embedding(saved({"emb_params": Runs(trap.canary)}), "x.pt")


@case
def an_embedding_in_the_first_pickle_protocol(trap: Trap) -> Read:
    return lambda: read_embedding(f"cposix\nsystem\n(S'touch {trap.canary}'\ntR.".encode(), "x.pt")


@case
def a_pickle_that_is_called_safetensors(trap: Trap) -> Read:
    return lambda: read_concept(pickle.dumps(Runs(trap.canary), protocol=2), "concept.safetensors")


@case
def a_checkpoint_that_calls_os_system(trap: Trap) -> Read:
    file = trap.folder / "model.ckpt"
    file.write_bytes(saved({"state_dict": {"model.diffusion_model.x": Runs(trap.canary)}}))
    return lambda: load_backbone(BaseModelFiles(file), DeviceParams(device="cpu", dtype="float32"))


@case
def weights_of_a_part_that_call_os_system(trap: Trap) -> Read:
    (trap.folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (trap.folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(saved({"conv_in.weight": Runs(trap.canary)}))
    return open_model(trap)


@case
def weights_of_an_evaluator_that_call_os_system(trap: Trap) -> Read:
    (trap.towers / "model.safetensors").unlink()
    (trap.towers / "pytorch_model.bin").write_bytes(saved({"logit_scale": Runs(trap.canary)}))
    return lambda: load_evaluator(f"clip:{trap.towers}")


@case
def a_tar_file_of_the_first_torch(trap: Trap) -> Read:
    file, pickled = io.BytesIO(), pickle.dumps(Runs(trap.canary), protocol=2)
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", "../../outside"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))
    return lambda: read_embedding(file.getvalue(), "x.pt")


@case
def a_dictionary_whose_methods_are_replaced(trap: Trap) -> Read:
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x05sb."
    return lambda: read_embedding(with_pickle(pickled), "x.pt")


# ------------------------------------------------------------------------------------------ memory and time


@case
def a_compressed_file_of_zeros(trap: Trap) -> Read:
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as entry,
    ):
        for _ in range(128):
            entry.write(bytes(1 << 20))
    return lambda: read_embedding(file.getvalue(), "x.pt")


@case
def a_zip_file_whose_entries_overlap(trap: Trap) -> Read:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
        archive.filelist += [archive.filelist[0]] * 5_000
    return lambda: read_embedding(file.getvalue(), "x.pt")


@case
def a_number_of_bytes_that_no_machine_has(trap: Trap) -> Read:
    return lambda: read_embedding(with_pickle(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R."), "x.pt")


@case
def a_storage_larger_than_its_file(trap: Trap) -> Read:
    reference = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x06\0\0\0\0\0\x01tQ."
    return lambda: read_embedding(with_pickle(b"\x80\x02" + reference, **{"data/0": b"1234"}), "x.pt")


@case
def a_key_whose_hash_takes_hours(trap: Trap) -> Read:
    return lambda: read_embedding(with_pickle(b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."), "x.pt")


@case
def a_million_nested_marks(trap: Trap) -> Read:
    return lambda: read_embedding(with_pickle(b"\x80\x02" + b"(" * 3_000_000 + b"t" * 3_000_000 + b"."), "x.pt")


@case
def a_checkpoint_that_holds_itself(trap: Trap) -> Read:
    file = trap.folder / "model.ckpt"
    file.write_bytes(with_pickle(b"\x80\x02}q\x00X\x0a\0\0\0state_dicth\x00s."))
    return lambda: load_backbone(BaseModelFiles(file), DeviceParams(device="cpu", dtype="float32"))


@case
def a_view_that_is_expanded_without_end(trap: Trap) -> Read:
    return lambda: read_embedding(saved({"emb_params": torch.zeros(1).expand(2**20, 2**20)}), "x.pt")


def safetensors(header: bytes, tensors: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


@case
def a_header_without_end(trap: Trap) -> Read:
    return lambda: read_concept(struct.pack("<Q", 2**63) + b"{}", "x.safetensors")


@case
def a_header_nested_without_end(trap: Trap) -> Read:
    return lambda: read_concept(safetensors(b'{"a":' * 500_000 + b"1" + b"}" * 500_000), "x.safetensors")


@case
def tensors_that_overlap(trap: Trap) -> Read:
    entries = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}
    return lambda: read_embedding(safetensors(json.dumps(entries).encode(), bytes(16)), "x.safetensors")


@case
def a_name_twice_for_other_bytes(trap: Trap) -> Read:
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    header = "{" + entry % (0, 4) + "," + entry % (4, 8) + "}"
    return lambda: read_embedding(safetensors(header.encode(), bytes(8)), "x.safetensors")


@case
def a_shape_that_no_machine_has(trap: Trap) -> Read:
    entry = {"a": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}
    return lambda: read_embedding(safetensors(json.dumps(entry).encode()), "x.safetensors")


@case
def a_model_of_more_layers_than_fit_in_memory(trap: Trap) -> Read:
    edit(trap.folder / "text_encoder" / "config.json", num_hidden_layers=10**9)
    return open_model(trap)


@case
def a_model_of_more_positions_than_fit_in_memory(trap: Trap) -> Read:
    edit(trap.folder / "text_encoder" / "config.json", max_position_embeddings=10**12)
    return open_model(trap)


@case
def a_noise_schedule_that_fits_in_no_memory(trap: Trap) -> Read:
    edit(trap.folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)
    return open_model(trap)


@case
def a_token_with_an_endless_number(trap: Trap) -> Read:
    edit(trap.folder / "tokenizer" / "tokenizer_config.json", added_tokens_decoder={"999999999999": {"content": "x"}})
    return open_model(trap)


@case
def a_model_index_nested_without_end(trap: Trap) -> Read:
    (trap.folder / "model_index.json").write_text("[" * 200_000 + "]" * 200_000)
    return open_model(trap)


# ------------------------------------------------------------------------------------------ code and files elsewhere


@case
def a_class_of_the_models_own(trap: Trap) -> Read:
    (trap.folder / "unet" / "evil.py").write_text(trap.code)
    edit(trap.folder / "model_index.json", unet=["evil", "UNet2DConditionModel"])
    return open_model(trap)


@case
def a_pipeline_of_the_models_own(trap: Trap) -> Read:
    (trap.folder / "pipeline.py").write_text(trap.code)
    edit(trap.folder / "model_index.json", _class_name=["pipeline", "StableDiffusionPipeline"])
    return open_model(trap)


@case
def code_for_a_part(trap: Trap) -> Read:
    (trap.folder / "text_encoder" / "evil.py").write_text(trap.code)
    edit(trap.folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Evil"}, trust_remote_code=True)
    return open_model(trap)


@case
def code_for_attention(trap: Trap) -> Read:
    edit(trap.folder / "text_encoder" / "config.json", _attn_implementation="evil/kernel")
    return open_model(trap)


@case
def code_for_a_tokenizer(trap: Trap) -> Read:
    (trap.folder / "tokenizer" / "evil.py").write_text(trap.code)
    edit(trap.folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    return open_model(trap)


@case
def code_for_an_image_processor(trap: Trap) -> Read:
    (trap.towers / "evil.py").write_text(trap.code)
    config = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}
    (trap.towers / "preprocessor_config.json").write_text(json.dumps(config))
    return lambda: load_evaluator(f"clip:{trap.towers}")


@case
def a_configuration_that_is_a_link_to_elsewhere(trap: Trap) -> Read:
    file = trap.folder / "unet" / "config.json"
    file.unlink()
    file.symlink_to(trap.secret)
    return open_model(trap)


@case
def a_vocabulary_that_is_a_link_to_elsewhere(trap: Trap) -> Read:
    (trap.folder / "tokenizer" / "added_tokens.json").symlink_to(trap.secret)
    return open_model(trap)


@case
def a_part_that_is_a_link_to_elsewhere(trap: Trap) -> Read:
    elsewhere = trap.folder.parents[1] / "vae"
    (trap.folder / "vae").rename(elsewhere)
    (trap.folder / "vae").symlink_to(elsewhere)
    return open_model(trap)


@harmless
def a_tokenizer_that_names_a_file_elsewhere(trap: Trap) -> Read:
    names = ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
    edit(trap.folder / "tokenizer" / "tokenizer_config.json", **dict.fromkeys(names, str(trap.secret)))
    return open_model(trap)


@harmless
def an_index_of_shards_that_names_a_file_elsewhere(trap: Trap) -> Read:
    index = {"weight_map": dict.fromkeys(load_file(trap.towers / "model.safetensors"), "../../secret.json")}
    (trap.towers / "model.safetensors.index.json").write_text(json.dumps(index))
    return lambda: load_evaluator(f"clip:{trap.towers}")


@harmless
def an_adapter_that_names_a_model_elsewhere(trap: Trap) -> Read:
    config = {"base_model_name_or_path": str(trap.secret.parent), "peft_type": "LORA"}
    (trap.towers / "adapter_config.json").write_text(json.dumps(config))
    return lambda: load_evaluator(f"clip:{trap.towers}")


@harmless
def metadata_with_yaml_tags_and_resolvers(trap: Trap) -> Read:
    texts = (
        f"!!python/object/apply:os.system ['touch {trap.canary}']",
        "${oc.env:HOME}",
        f"${{include:{trap.secret}}}",
    )
    metadata = ConceptMetadata(
        base_model=texts[0],
        base_model_fingerprint=texts[1],
        num_branches=1,
        num_steps=1,
        words={},
        num_vectors=(1, 1),
        lora={},
        class_word=texts[2],
        templates=texts,
    )

    def read() -> None:
        assert read_concept(write_tensors({}, metadata.write()), "x").metadata == metadata  # as they are

    return read


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_malicious_file_is_refused(make: Make, trap: Trap) -> None:
    read = make(trap)
    trap.opened.clear()
    started = time.process_time()
    with pytest.raises(InputError) as raised:
        read()
    assert time.process_time() - started < LIMIT_S
    assert not trap.canary.exists()
    assert str(trap.secret) not in trap.opened
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS)
def test_what_a_file_names_elsewhere_is_neither_run_nor_read(make: Make, trap: Trap) -> None:
    read = make(trap)
    trap.opened.clear()
    read()
    assert not trap.canary.exists()
    assert not {str(trap.secret), str(trap.secret.resolve())} & {os.path.realpath(path) for path in trap.opened}


def test_weights_that_are_not_numbers_are_named(trap: Trap) -> None:
    file = trap.folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(InputError, check=lambda error: "conv_in.bias" in error.got and "finite" in error.expected):
        open_model(trap)()
