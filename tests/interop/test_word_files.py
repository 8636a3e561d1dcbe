"""Embeddings in all their forms."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from dreamartist_pipeline.backbones.families.sd import V1_NAMES as NAMES
from dreamartist_pipeline.core.concept import TriggerWord
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, read_tensors, write_tensors
from dreamartist_pipeline.interop.word_files import read_embedding, write_embedding, write_embedding_pt

VECTORS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
WORD = TriggerWord("my-fox-neg", "pt1", "negative", {"text_encoder": VECTORS})
FACTS = FileFacts("fox-neg", "my-fox-neg", "epsilon", names=NAMES)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_an_embedding_file_holds_emb_params_and_says_whether_it_is_a_negative_one() -> None:
    file = write_embedding(WORD, FACTS, torch.float16)
    assert {name: tensor.dtype for name, tensor in read_tensors(file, "x").items()} == {"emb_params": torch.float16}
    metadata = read_metadata(file)
    assert metadata["modelspec.is_negative_embedding"] == "true"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert torch.equal(read_embedding(file, "my-fox-neg.safetensors"), VECTORS)


def test_the_old_form_is_written_and_read() -> None:
    file = write_embedding_pt(WORD)
    assert torch.load(io.BytesIO(file), weights_only=True)["name"] == "my-fox-neg"
    assert torch.equal(read_embedding(file, "my-fox-neg.pt"), VECTORS)


def test_a_file_that_names_its_tensor_after_the_word_is_read() -> None:
    assert torch.equal(read_embedding(write_tensors({"<fox>": VECTORS}, {}), "fox.safetensors"), VECTORS)


def test_one_vector_without_a_row_axis_becomes_one_row() -> None:
    assert read_embedding(write_tensors({"<fox>": VECTORS[0]}, {}), "fox.safetensors").tolist() == [[1.0, 2.0]]


def test_a_parameter_in_an_old_file_is_read() -> None:
    content = {"string_to_param": {"*": torch.nn.Parameter(VECTORS)}, "string_to_token": {"*": 265}, "step": 100}
    came = read_embedding(saved(content), "fox.pt")
    assert torch.equal(came, VECTORS) and not came.requires_grad


def test_the_first_textual_inversions_are_read() -> None:
    """They keep a module where later ones have a dictionary; old versions of torch wrote it without `_keys`."""
    params = torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)})
    for missing in ((), ("_keys",)):
        for name in missing:
            del vars(params)[name]
        content = {"string_to_param": params, "string_to_token": {"*": torch.tensor(265)}}
        assert torch.equal(read_embedding(saved(content), "fox.pt"), VECTORS)


def test_diffusers_old_bin_file_is_read() -> None:
    assert torch.equal(read_embedding(saved({"<fox>": VECTORS}), "learned_embeds.bin"), VECTORS)


def test_several_embeddings_in_one_file_are_refused() -> None:
    file = write_tensors({"clip_l": VECTORS, "clip_g": VECTORS + 1}, {})
    with pytest.raises(InputError, match=r"expected one embedding \[n, D\] in fox.safetensors"):
        read_embedding(file, "fox.safetensors")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_file_that_wants_to_run_code_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for file in (saved({"string_to_param": Evil()}), pickle.dumps(Evil(), protocol=2)):
        with pytest.raises(
            InputError, match=r"loads without running code; got one that asks for \S*print; make"
        ) as told:
            read_embedding(file, "fox.pt")
        assert "weights_only" not in str(told.value)
    assert "ran" not in capsys.readouterr().out


def test_what_is_no_embedding_is_refused() -> None:
    with pytest.raises(InputError, match="expected an embedding in fox.pt; got a list"):
        read_embedding(saved([1, 2]), "fox.pt")


def test_a_damaged_file_is_refused_by_name() -> None:
    for damaged in (b"not a file at all", saved({"*": VECTORS})[:-40], b"", b"h\x00.", b"a" * 100):
        with pytest.raises(InputError, match="expected an embedding in fox.pt"):
            read_embedding(damaged, "fox.pt")


def test_the_reference_toolkits_older_form_is_read() -> None:
    assert torch.equal(read_embedding(saved({"emb_params": VECTORS, "name": "my-fox"}), "my-fox.pt"), VECTORS)


def test_a_view_of_fewer_numbers_than_it_has_is_refused_before_it_is_copied() -> None:
    file = saved({"emb_params": torch.zeros(1).expand(100_000, 768)})
    assert len(file) < 2000
    with pytest.raises(InputError, match=r"'emb_params' in big.pt; got a view of shape \(100000, 768\) of 1 numbers"):
        read_embedding(file, "big.pt")
    assert torch.equal(read_embedding(saved({"emb_params": VECTORS.T}), "turned.pt"), VECTORS.T)


def test_a_tensor_without_its_numbers_is_refused() -> None:
    for tensor in (torch.empty(9, 768, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(InputError, match=r"in x.pt; got a sparse, quantized or empty \(meta\) one"):
            read_embedding(saved({"emb_params": tensor}), "x.pt")


def test_a_single_number_is_no_embedding() -> None:
    for name, file in (
        ("x.pt", saved({"*": torch.tensor(1.0)})),
        ("x.safetensors", write_tensors({"*": torch.tensor(1.0)}, {})),
    ):
        with pytest.raises(InputError, match=rf"one embedding \[n, D\] in {name}; got {{'\*': \(\)}}"):
            read_embedding(file, name)


def test_a_dictionary_that_holds_itself_is_refused() -> None:
    content: dict[str, object] = {}
    content["string_to_param"] = content
    with pytest.raises(InputError, match=r"expected one embedding \[n, D\] in x.pt"):
        read_embedding(saved(content), "x.pt")


def test_numbers_of_a_type_that_torch_has_not_are_refused() -> None:
    header = b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    with pytest.raises(InputError, match="expected a safetensors file x.safetensors"):
        read_embedding(len(header).to_bytes(8, "little") + header + bytes(2), "x.safetensors")
