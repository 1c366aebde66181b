"""Prompt files and a tokenizer of one token a character."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

Rows = Sequence[Any]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The id of a character is its code point; as many tokenizers do, it puts a token in front of plain text."""
    vocab = {chr(code): code for code in range(128)}
    model = Tokenizer(WordLevel(vocab, unk_token="?"))
    model.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    model.post_processor = TemplateProcessing(single="\x01 $A", special_tokens=[("\x01", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=TEMPLATE, bos_token="\x01")


@pytest.fixture(params=["parquet", "jsonl"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """write(rows, name) makes a file of each kind in turn."""

    def make(rows: Rows, name: str = "train") -> Path:
        path = tmp_path / f"{name}.{request.param}"
        if request.param == "parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return make
