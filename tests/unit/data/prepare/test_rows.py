"""Local files as rows of the recipe's schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dapo.data.files import MalformedRowError, MissingColumnError, MissingFileError, UnreadableFileError
from megatron_dapo.data.prepare import rows as module
from megatron_dapo.data.prepare.rows import COLUMNS, ProblemColumns, RowFiles
from tests.unit.data.fakes import row

Write = Callable[..., Path]


def read(files: RowFiles) -> list[dict]:
    return [value for chunk in files for value in chunk.rows.to_pylist()]


def test_rows_of_the_schema_come_back_as_they_stand(write: Write) -> None:
    given = [row("a", "1", extra_info={"index": "x", "level": 3}), row("b", "2", ability="algebra")]
    found = read(RowFiles([write(given)]))
    assert [each["prompt"] for each in found] == [each["prompt"] for each in given]
    assert [each["reward_model"]["ground_truth"] for each in found] == ["1", "2"]
    assert found[0]["extra_info"] == {"index": "x", "level": 3}
    assert found[1]["ability"] == "algebra"
    assert all(tuple(each) == COLUMNS for each in found)


def test_a_plain_problem_gets_the_prompt_text_of_the_recipe(write: Write) -> None:
    path = write([{"question": "1+1?", "solution": "2", "from": "sums"}])
    [found] = read(RowFiles([path], ProblemColumns("question", "solution", "from")))
    assert found == {
        "data_source": "sums",
        "prompt": [
            {
                "role": "user",
                "content": "Solve the following math problem step by step. The last line of your response should be "
                "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n1+1?\n\n"
                'Remember to put your answer on its own line after "Answer:".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0},
    }


def test_whole_numbers_are_answers_and_rows_are_numbered_in_their_file(write: Write) -> None:
    one, two = write([{"problem": "a", "answer": 7}], "one"), write([{"problem": "b", "answer": 8}] * 2, "two")
    found = read(RowFiles([one, two], ProblemColumns(data_source="mine")))
    assert [each["reward_model"]["ground_truth"] for each in found] == ["7", "8", "8"]
    assert [each["extra_info"]["index"] for each in found] == [0, 0, 1]
    assert {each["data_source"] for each in found} == {"mine"}


def test_stretches_of_one_file_and_files_of_several_fields_share_one_schema(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    one = write([row("a"), row("b"), row("c", extra_info={"index": "i", "level": 1})], "one")
    two = write([row("d", extra_info={"split": "s"})], "two")
    files = RowFiles([one, two])
    chunks = list(files)
    assert [len(chunk.rows) for chunk in chunks] == [2, 1, 1]
    assert {chunk.rows.schema for chunk in chunks} == {files.schema}
    assert read(files)[2]["extra_info"] == {"index": "i", "level": 1, "split": None}
    assert chunks[1].where(0) == f"{one} row 2 (from 0)"


def test_ability_and_extra_info_are_filled_in_where_a_file_has_none(write: Write) -> None:
    bare = [{key: row(text)[key] for key in ("data_source", "prompt", "reward_model")} for text in "ab"]
    found = read(RowFiles([write(bare)]))
    assert [(each["ability"], each["extra_info"]) for each in found] == [("math", {"index": 0}), ("math", {"index": 1})]


def test_rows_are_counted_without_reading_where_the_files_are_parquet(tmp_path: Path) -> None:
    parquet, jsonl = tmp_path / "a.parquet", tmp_path / "a.jsonl"
    pq.write_table(pa.Table.from_pylist([row("a"), row("b")]), parquet)
    jsonl.write_text(json.dumps(row("a")) + "\n")
    assert RowFiles([parquet, parquet]).num_rows == 4
    assert RowFiles([parquet, jsonl]).num_rows is None


def test_a_missing_column_is_told_with_those_that_are_there(write: Write) -> None:
    with pytest.raises(MissingColumnError, match=r"no column 'reward_model'; it has data_source, prompt"):
        read(RowFiles([write([{"data_source": "s", "prompt": [{"role": "user", "content": "a"}]}])]))
    with pytest.raises(MissingColumnError, match=r"row 0.*no column 'problem'; it has question, answer; say which"):
        read(RowFiles([write([{"question": "a", "answer": "b"}])], ProblemColumns()))


@pytest.mark.parametrize("answer", [None, " ", 1.5])
def test_a_problem_without_a_usable_answer_is_told_with_its_place(write: Write, answer: object) -> None:
    path = write([{"problem": "a", "answer": answer}])
    with pytest.raises(MalformedRowError, match=r"row 0 \(from 0\): 'answer' is .*must be text"):
        read(RowFiles([path], ProblemColumns()))


def test_types_that_differ_between_rows_or_files_are_told(tmp_path: Path, write: Write) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row("a", extra_info={"index": index})) + "\n" for index in (1, "x")))
    with pytest.raises(MalformedRowError, match=r"rows 0 to 1 \(from 0\): 'extra_info' has values of several types"):
        RowFiles([mixed])
    one, two = write([row("a", extra_info={"index": 1})], "one"), write([row("a")], "two")
    with pytest.raises(MalformedRowError, match=r"two.* other types than the rows before it, from .*one"):
        RowFiles([one, two])


def test_a_file_that_is_not_there_or_of_another_kind_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nothing\.parquet is not there"):
        RowFiles([tmp_path / "nothing.parquet"])
    for name, fault in (("rows.csv", "ends in '.csv'"), ("rows.parquet", "cannot be read as parquet")):
        (tmp_path / name).write_text("a,b\n")
        with pytest.raises(UnreadableFileError, match=fault):
            RowFiles([tmp_path / name])
