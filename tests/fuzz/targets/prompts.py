"""Prompts and prompt databases."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dreamartist_pipeline.core.captions import check_slots, fill_negative_prompt, fill_template, without_weights
from dreamartist_pipeline.core.embeddings import Vocabulary
from dreamartist_pipeline.datasets.prompts import PromptDatabaseDataset
from dreamartist_pipeline.datasets.subject_list import SubjectListDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PersonalizeParams, PromptsParams
from dreamartist_pipeline.pipelines.personalize.planning import subject_runs
from dreamartist_pipeline.pipelines.prompts.nodes import check_prompts, draw_regularization_prompts
from dreamartist_pipeline.prompt_weights import parse_weights
from fuzz.fuzzing import Target

_PROMPTS = (
    "a {fox:1.3} in the {snow:0.8}, {{bright} light}",
    "two my-fox, blue background, ${style}",
    "a {pt1}, {caption:1.2}, {class}",
    "狐my‑fox and a my-fox-neg {e\u0301:2}",
)
_WORDS = {"pt1": ("my-fox", "my-fox-neg")}
_VOCABULARY = Vocabulary.build(_WORDS, (3, 6), first_id=100)


def _prompt(file: Path) -> object:
    prompt = file.read_bytes().decode(errors="surrogateescape")
    parse_weights(prompt)  # the schema does so first
    check_slots([prompt], _WORDS)
    filled = fill_template(prompt, {"pt1": "my-fox", "caption": "a cat"})
    plain = "".join(part for part, _ in parse_weights(filled))
    return _VOCABULARY.split_prompt(plain), fill_negative_prompt(prompt, {"pt1": "x"}), without_weights(prompt)


def _tables() -> dict[str, bytes]:
    prompts = [f"a {kind} cat number {number}" for number in range(20) for kind in ("red", "blue")]
    plain = pa.table({"prompt": prompts, "seed": range(len(prompts))})
    named = pa.table({"image_name": [f"{n}.png" for n in range(40)], "Text": prompts, "tags": [["a"]] * 40})
    tables = {"plain": plain, "named": named, "large": pa.table({"prompt": pa.array(prompts, pa.large_string())})}
    files = {"prompts.csv": b"prompt,seed\na red cat,1\n", "prompts.txt": b"a red cat\na blue dog\n"}
    for name, table in tables.items():
        for compression in ("NONE", "ZSTD", "SNAPPY"):
            file = io.BytesIO()
            pq.write_table(table, file, compression=compression, use_dictionary=compression != "NONE")
            files[f"{name}-{compression}.parquet"] = file.getvalue()
    return files


def _database(file: Path) -> object:
    params = PromptsParams(num_prompts=2)
    dataset = PromptDatabaseDataset(filepath=str(file))
    with contextlib.suppress(InputError):  # the table may be damaged in a column that is not read
        dataset.preview()
    database = dataset.load()
    check_prompts(params, None, database)
    return draw_regularization_prompts(database, params)


def _subject_tables() -> dict[str, bytes]:
    table = pa.table({"subject": ["fox", "owl"], "image": ["fox.png", "owl.png"], "training.seed": [7, None]})
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    text = 'subject,image,"training.seed"\nfox,"fox, red.png",7\nowl,owl.png,\n'
    return {"subjects.csv": text.encode(), "subjects.parquet": parquet.getvalue()}


def _subjects(file: Path) -> object:
    return subject_runs(SubjectListDataset(path=str(file.parent), source=str(file)).load(), PersonalizeParams())


TARGETS = [
    Target("prompt", lambda: {f"{number}.txt": prompt.encode() for number, prompt in enumerate(_PROMPTS)}, _prompt),
    Target("prompt database", _tables, _database),
    Target("table of subjects", _subject_tables, _subjects),
]
