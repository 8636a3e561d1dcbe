"""Embedding files of all formats."""

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
from dreamartist_pipeline.interop.word_files import read_embedding, word_inside, write_embedding, write_embedding_pt
from refusals import says

VECTORS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
WORD = TriggerWord("my-fox-neg", "pt1", "negative", {"text_encoder": VECTORS})
FACTS = FileFacts("fox-neg", "my-fox-neg", "epsilon", names=NAMES)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_an_embedding_file_has_emb_params_and_a_flag_for_negative_words() -> None:
    file = write_embedding(WORD, FACTS, torch.float16)
    assert {name: tensor.dtype for name, tensor in read_tensors(file, "x").items()} == {"emb_params": torch.float16}
    metadata = read_metadata(file)
    assert metadata["modelspec.is_negative_embedding"] == "true"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert torch.equal(read_embedding(file, "my-fox-neg.safetensors"), VECTORS)


def test_the_pickled_format_is_written_and_read() -> None:
    file = write_embedding_pt(WORD)
    assert torch.load(io.BytesIO(file), weights_only=True)["name"] == "my-fox-neg"
    assert torch.equal(read_embedding(file, "my-fox-neg.pt"), VECTORS)


def test_a_file_that_names_its_tensor_after_the_word_is_read() -> None:
    assert torch.equal(read_embedding(write_tensors({"<fox>": VECTORS}, {}), "fox.safetensors"), VECTORS)


def test_one_vector_without_a_row_axis_becomes_one_row() -> None:
    assert read_embedding(write_tensors({"<fox>": VECTORS[0]}, {}), "fox.safetensors").tolist() == [[1.0, 2.0]]


def test_a_parameter_in_an_old_file_is_read() -> None:
    content = {"string_to_param": {"*": torch.nn.Parameter(VECTORS)}, "string_to_token": {"*": 265}, "step": 100}
    vectors = read_embedding(saved(content), "fox.pt")
    assert torch.equal(vectors, VECTORS) and not vectors.requires_grad


def test_the_first_textual_inversions_are_read() -> None:
    """They have a module instead of a dictionary; old versions of torch pickled it without `_keys`."""
    params = torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)})
    for missing in ((), ("_keys",)):
        for name in missing:
            del vars(params)[name]
        content = {"string_to_param": params, "string_to_token": {"*": torch.tensor(265)}}
        assert torch.equal(read_embedding(saved(content), "fox.pt"), VECTORS)


def test_diffusers_old_bin_file_is_read() -> None:
    assert torch.equal(read_embedding(saved({"<fox>": VECTORS}), "learned_embeds.bin"), VECTORS)


def test_several_embeddings_in_one_file_are_refused() -> None:
    file = write_tensors({"cat": VECTORS, "dog": VECTORS + 1}, {})
    with pytest.raises(InputError, check=says(expected="one embedding", got="'dog': (3, 2)")):
        read_embedding(file, "fox.safetensors")


class RunsCode:
    """Calls print when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_file_that_runs_code_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for file in (saved({"string_to_param": RunsCode()}), pickle.dumps(RunsCode(), protocol=2)):
        with pytest.raises(InputError, check=says(expected="fox.pt", got="print")) as error:
            read_embedding(file, "fox.pt")
        assert "weights_only" not in str(error.value)
    assert "ran" not in capsys.readouterr().out


def test_an_embedding_for_sdxl_is_named() -> None:
    file = write_tensors({"clip_l": VECTORS, "clip_g": VECTORS + 1}, {})
    with pytest.raises(InputError, check=says(got="Stable Diffusion XL", remedy="--env sdxl")):
        read_embedding(file, "cat.safetensors")


def test_what_is_no_embedding_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="fox.pt", got="list")):
        read_embedding(saved([1, 2]), "fox.pt")


def test_a_damaged_file_is_refused_by_name() -> None:
    for damaged in (b"not a file at all", saved({"*": VECTORS})[:-40], b"", b"h\x00.", b"a" * 100):
        with pytest.raises(InputError, check=says(expected="fox.pt", got="damaged")):
            read_embedding(damaged, "fox.pt")


def test_the_reference_toolkits_old_format_is_read() -> None:
    assert torch.equal(read_embedding(saved({"emb_params": VECTORS, "name": "my-fox"}), "my-fox.pt"), VECTORS)


def test_an_expanded_view_is_refused_before_it_is_copied() -> None:
    file = saved({"emb_params": torch.zeros(1).expand(100_000, 768)})
    assert len(file) < 2000
    with pytest.raises(InputError, check=says(expected="'emb_params' in big.pt", got="(100000, 768) of 1 ")):
        read_embedding(file, "big.pt")
    assert torch.equal(read_embedding(saved({"emb_params": VECTORS.T}), "turned.pt"), VECTORS.T)


def test_a_meta_or_sparse_tensor_is_refused() -> None:
    for tensor in (torch.empty(9, 768, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(InputError, check=says(expected="x.pt", got="meta")):
            read_embedding(saved({"emb_params": tensor}), "x.pt")


def test_a_single_number_is_no_embedding() -> None:
    for name, file in (
        ("x.pt", saved({"*": torch.tensor(1.0)})),
        ("x.safetensors", write_tensors({"*": torch.tensor(1.0)}, {})),
    ):
        with pytest.raises(InputError, check=says(expected=name, got="{'*': ()}")):
            read_embedding(file, name)


def test_a_dictionary_that_holds_itself_is_refused() -> None:
    content: dict[str, object] = {}
    content["string_to_param"] = content
    with pytest.raises(InputError, check=says(expected="x.pt", got="{'string_to_param': ()}")):
        read_embedding(saved(content), "x.pt")


def test_a_dtype_that_torch_does_not_have_is_refused() -> None:
    header = b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    with pytest.raises(InputError, check=says(expected="x.safetensors", got="F4")):
        read_embedding(len(header).to_bytes(8, "little") + header + bytes(2), "x.safetensors")


def test_the_bytes_say_which_form_a_file_has_whatever_it_is_called() -> None:
    pickled, plain = saved({"string_to_param": {"*": VECTORS}}), write_tensors({"emb_params": VECTORS}, {})
    for name, file in (("fox.safetensors", pickled), ("fox.ref", pickled), ("fox.pt", plain), ("fox.bin", plain)):
        assert torch.equal(read_embedding(file, name), VECTORS)


def test_an_embedding_of_the_text_encoders_output_is_refused() -> None:
    """OneTrainer writes zeros beside it, which would be a word that means nothing."""
    for tensors in ({"emp_params": VECTORS * 0, "emp_params_out": VECTORS}, {"emp_params_out": VECTORS}):
        with pytest.raises(InputError, check=says(expected="fox.safetensors", got="emp_params_out")):
            read_embedding(write_tensors(tensors, {}), "fox.safetensors")


def test_a_lora_is_no_word_and_not_listed_key_by_key() -> None:
    tensors = {f"lora_unet_{i}.{part}.weight": VECTORS.clone() for i in range(50) for part in ("lora_down", "lora_up")}
    with pytest.raises(InputError, check=says(got="a LoRA of 100 tensors", remedy="import.positive")):
        read_embedding(write_tensors(tensors, {}), "fox.safetensors")


@pytest.mark.parametrize(
    ("file", "word"),
    [
        (write_tensors({"<cat-toy>": VECTORS}, {"format": "pt"}), "<cat-toy>"),
        (saved({"<cat-toy>": VECTORS}), "<cat-toy>"),
        (saved({"string_to_param": {"*": VECTORS}, "name": "my-cat"}), "my-cat"),
        (saved({"string_to_param": {"*": VECTORS}, "name": None}), ""),
        (saved({"emb_params": VECTORS}), ""),
        (write_tensors({"emb_params": VECTORS}, {}), ""),
        (write_tensors({"emp_params": VECTORS}, {}), ""),
        (write_embedding(WORD, FACTS, torch.float16), "my-fox-neg"),
    ],
)
def test_the_word_inside_a_file_is_found(file: bytes, word: str) -> None:
    assert word_inside(file, "x") == word


def test_a_tensor_without_a_name_is_refused_with_the_name_it_needs() -> None:
    with pytest.raises(InputError, check=says(expected="vec.pt", got="[4, 6]", remedy="emb_params")):
        read_embedding(saved(torch.ones(4, 6)), "vec.pt")
