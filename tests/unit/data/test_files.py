"""Prompt files, whole and broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.data import files
from megatron_dapo.data.files import (
    MalformedRowError,
    MissingColumnError,
    MissingFileError,
    RowTable,
    UnreadableFileError,
    read_rows,
)
from tests.unit.data.fakes import row

Write = Callable[..., Path]


def problems(table: RowTable) -> list[str]:
    return [table.distinct[i].messages[0][1] for i in table.index]


def test_rows_come_in_file_order_and_repeated_ones_are_held_once(write: Write) -> None:
    one = write([row("a"), row("b"), row("a"), row("c")], "one")
    two = write([row("c"), row("b"), row("d")], "two")
    table = read_rows([one, two], "prompt")
    assert problems(table) == ["a", "b", "a", "c", "c", "b", "d"]
    assert len(table.distinct) == 4


def test_a_row_keeps_all_that_scoring_needs(write: Write) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "line\u2028two"}]
    [held] = read_rows([write([row("x", "7", prompt=messages)])], "prompt").distinct
    assert held.messages == (("system", "s"), ("user", "line\u2028two"))
    assert (held.data_source, held.ground_truth, held.extra_info) == ("math_dapo", "7", {"index": "id of x"})


@pytest.mark.parametrize(
    "change",
    [
        {"data_source": "other"},
        {"reward_model": {"style": "rule", "ground_truth": "2"}},
        {"extra_info": {"index": "other"}},
        {"prompt": [{"role": "system", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]},
    ],
)
def test_rows_that_differ_anywhere_are_different_rows(write: Write, change: dict) -> None:
    table = read_rows([write([row("a"), row("a", **change), row("a")])], "prompt")
    assert table.index.tolist()[0] == table.index.tolist()[2] != table.index.tolist()[1]


@given(
    st.lists(
        st.lists(st.fixed_dictionaries({"role": st.sampled_from("ab"), "content": st.sampled_from(["", "x", "xx"])})),
        min_size=1,
        max_size=30,
    )
)
def test_nested_arrow_values_have_equal_codes_exactly_where_they_are_equal(values: list) -> None:
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    codes = files.equality_codes(pa.array([None, *values, []], kind)[1:])
    values = [*values, []]
    for i, left in enumerate(values):
        for j, right in enumerate(values):
            assert (codes[i] == codes[j]) == (left == right)


def test_a_missing_value_is_not_an_empty_one() -> None:
    codes = files.equality_codes(pa.array([{"a": None}, {"a": []}, {"a": [1]}, None, {"a": []}]))
    assert len({int(code) for code in codes}) == 4
    assert codes[1] == codes[4]


def test_a_whole_number_as_ground_truth_is_taken_as_text(write: Write) -> None:
    assert read_rows([write([row("a", 12)])], "prompt").distinct[0].ground_truth == "12"


def test_extra_info_may_be_left_out(write: Write) -> None:
    short = row("a")
    del short["extra_info"]
    assert read_rows([write([short])], "prompt").distinct[0].extra_info == {}


def test_the_prompt_column_may_have_another_name(write: Write) -> None:
    renamed = row("a")
    renamed["question"] = renamed.pop("prompt")
    assert problems(read_rows([write([renamed])], "question")) == ["a"]


@pytest.mark.parametrize(
    "column, remedy", [("prompt", "set data.prompt_key"), ("data_source", "add it"), ("reward_model", "add it")]
)
def test_a_missing_column_is_named_with_those_there_are(write: Write, column: str, remedy: str) -> None:
    short = row("a")
    del short[column]
    path = write([short])
    with pytest.raises(
        MissingColumnError, match=rf"{path.name}.* has no column '{column}'; it has .*ability.*; {remedy}"
    ):
        read_rows([path], "prompt")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(MissingFileError, match=r"/no/such\.parquet is not there.*data\.train_files"):
        read_rows(["/no/such.parquet"], "prompt")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("a,b")
    with pytest.raises(UnreadableFileError, match=r"train\.csv ends in '\.csv'; .* \.parquet or \.jsonl"):
        read_rows([path], "prompt")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(UnreadableFileError, match=r"train\.parquet cannot be read as parquet"):
        read_rows([path], "prompt")


@pytest.mark.parametrize("content, says", [(b"\xff\xfe", "not UTF-8"), (b'{"a": 1}\n{', "line 1 has no column")])
def test_a_broken_jsonl_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(files.PromptDataError, match=rf"train\.jsonl .*{says}"):
        read_rows([path], "prompt")


@pytest.mark.parametrize("line, says", [("{", "is no JSON"), ("[1]", "holds a list")])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row("a")) + "\n\n" + line + "\n")
    with pytest.raises(MalformedRowError, match=rf"train\.jsonl line 3 {says}"):
        read_rows([path], "prompt")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"prompt": "solve"}, r"'prompt' is 'solve'; it must be a list, not empty"),
        ({"prompt": []}, r"'prompt' is \[\]; it must be a list, not empty"),
        ({"prompt": None}, "'prompt' is None"),
        ({"prompt": [{"role": "user"}]}, r"'prompt' is \[\{'role': 'user'\}\]; .*\"content\": text"),
        ({"reward_model": {"style": "rule"}}, "'reward_model' is .* must hold a ground_truth"),
        ({"reward_model": {"ground_truth": 1.5}}, "'reward_model' is .*1.5.* text or a whole number"),
        ({"reward_model": None}, "'reward_model' is None"),
        ({"data_source": 3}, "'data_source' is 3; it must be text"),
        ({"extra_info": [1]}, r"'extra_info' is \[1\]; it must be an object"),
    ],
)
def test_a_malformed_row_is_named_with_what_it_holds(write: Write, change: dict, says: str) -> None:
    path = write([row("a", **change), row("b", **change), row("a", **change)])
    where = "row 0" if path.suffix == ".parquet" else "line 1"
    with pytest.raises(MalformedRowError, match=rf"{path.name} {where}.*{says}"):
        read_rows([path], "prompt")


def test_a_malformed_row_further_on_is_named_by_its_own_number(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    two = pa.Table.from_pylist([row("a"), row("b", None)])
    pq.write_table(two.take(pa.array([0] * (files.BATCH_ROWS + 6) + [1, 0])), path)
    with pytest.raises(MalformedRowError, match=rf"train\.parquet row {files.BATCH_ROWS + 6} "):
        read_rows([path], "prompt")


def test_a_column_of_categories_is_read_as_its_values(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row("a"), row("a", data_source="other"), row("a")])
    position = table.column_names.index("data_source")
    table = table.set_column(position, "data_source", table["data_source"].dictionary_encode())
    pq.write_table(table, tmp_path / "train.parquet")
    read = read_rows([tmp_path / "train.parquet"], "prompt")
    assert [read.distinct[i].data_source for i in read.index] == ["math_dapo", "other", "math_dapo"]


def test_a_long_file_is_the_same_as_its_rows_one_by_one(tmp_path: Path) -> None:
    order = np.random.default_rng(0).integers(0, 40, files.BATCH_ROWS + 1000)
    order[-1] = 40
    table = pa.Table.from_pylist([row(f"p{i}") for i in range(41)]).take(pa.array(order))
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=100_000)
    read = read_rows([tmp_path / "train.parquet"], "prompt")
    assert len(read.distinct) == 41
    assert problems(read) == [f"p{i}" for i in order]
