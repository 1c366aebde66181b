"""Counting, dropping, splitting and writing in one pass, against plain loops over the same rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_dapo.config.tree import DataConfig
from megatron_dapo.data.files import MalformedRowError, PromptDataError
from megatron_dapo.data.prepare import rows as rows_module
from megatron_dapo.data.prepare.pipeline import Preparation, prepare
from megatron_dapo.data.prepare.rows import RowFiles
from megatron_dapo.data.prompts import NoChatTemplateError, load_prompts
from tests.unit.data.fakes import row

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that repetitions stand in several stretches."""
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", 7)


def many(count: int = 100, prompts: int = 30) -> list[dict]:
    rng = random.Random(0)
    texts = ["x" * rng.randrange(1, 40) + str(number) for number in range(prompts)]
    return [row(rng.choice(texts), extra_info={"index": str(number)}) for number in range(count)]


def contents(path: Path) -> list[str]:
    return [each["prompt"][0]["content"] for each in pq.read_table(path).to_pylist()]


def text(each: dict) -> str:
    return each["prompt"][0]["content"]


def test_rows_prompts_and_repetitions_are_those_of_a_plain_count(write: Write) -> None:
    given = many()
    report = prepare(RowFiles([write(given)]), Preparation())
    counts = sorted([text(each) for each in given].count(one) for one in {text(each) for each in given})
    middle = len(counts) // 2
    median = counts[middle] if len(counts) % 2 else (counts[middle - 1] + counts[middle]) / 2
    assert (report.rows, report.distinct, report.duplicates) == (100, len(counts), 100 - len(counts))
    assert report.repeats == (counts[0], median, counts[-1])
    assert report.sources == (("math_dapo", 100),)
    assert report.outputs == ()


def test_the_first_row_of_each_prompt_stays_in_its_order(write: Write, tmp_path: Path) -> None:
    given = many()
    report = prepare(RowFiles([write(given)]), Preparation(tmp_path / "out.parquet", deduplicate=True))
    first = {text(each): each["extra_info"]["index"] for each in reversed(given)}
    written = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [text(each) for each in written] == list(dict.fromkeys(text(each) for each in given))
    assert all(each["extra_info"]["index"] == first[text(each)] for each in written)
    assert [(output.rows, output.prompts) for output in report.outputs] == [(len(first), len(first))]


def test_lengths_are_what_training_will_see(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(many())
    lengths = prepare(RowFiles([path]), Preparation(), tokenizer).lengths
    dataset, loaded = load_prompts([path], tokenizer, DataConfig(max_prompt_length=1000))
    tokens = sorted({prompt.text: len(prompt.token_ids) for prompt in dataset.distinct}.values())
    assert (lengths.shortest, lengths.longest) == (tokens[0], loaded.longest) == (tokens[0], tokens[-1])


def test_prompts_over_the_limit_are_left_out_and_counted(
    write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    given = many()
    plan = Preparation(tmp_path / "out.parquet", max_prompt_tokens=40)
    report = prepare(RowFiles([write(given)]), plan, tokenizer)
    around = len("<user>") + len("<assistant>")  # of the tokenizer's chat template
    short = [text(each) for each in given if len(text(each)) + around <= 40]
    assert contents(tmp_path / "out.parquet") == short
    assert 0 < report.lengths.rows_over == len(given) - len(short)
    assert report.lengths.prompts_over == len({text(each) for each in given}) - len(set(short))


def test_no_prompt_is_on_both_sides_of_a_split_and_none_is_lost(write: Write, tmp_path: Path) -> None:
    given = many(400, 200)
    paths = tmp_path / "train.parquet", tmp_path / "validation.parquet"
    prepare(RowFiles([write(given)]), Preparation(*paths, validation_share=0.25))
    train, validation = (contents(path) for path in paths)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(text(each) for each in given)
    assert 20 < len(set(validation)) < 80  # a quarter of about 175 prompts


def test_which_prompts_are_split_off_depends_on_seed_and_text_alone(write: Write, tmp_path: Path) -> None:
    given = many(400, 200)

    def split_off(rows: list[dict], seed: int) -> set[str]:
        plan = Preparation(tmp_path / "t.parquet", tmp_path / "v.parquet", validation_share=0.25, seed=seed)
        prepare(RowFiles([write(rows, f"seed{seed}")]), plan)
        return set(contents(tmp_path / "v.parquet"))

    assert split_off(given, 1) == split_off(given[::-1], 1) != split_off(given, 2)


def test_prompts_with_two_ground_truths_are_counted_and_the_first_place_is_told(write: Write) -> None:
    path = write([row("a", "1"), row("b", "2"), *[row("c", "3")] * 8, row("a", "9"), row("b", "2"), row("a", "1")])
    report = prepare(RowFiles([path]), Preparation())
    assert (report.distinct, report.conflicting) == (3, 1)
    assert report.first_conflict == f"{path} row 10 (from 0)"


def test_a_row_that_does_not_fit_leaves_the_old_file_and_no_other(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out" / "rows.parquet"
    prepare(RowFiles([write(many(10))]), Preparation(out))
    broken = write([*many(50), row("z", reward_model={"style": "rule", "ground_truth": None})], "broken")
    with pytest.raises(MalformedRowError, match=r"broken.* row 50 .*must hold a ground_truth"):
        prepare(RowFiles([broken]), Preparation(out))
    assert [path.name for path in out.parent.iterdir()] == ["rows.parquet"]
    assert len(contents(out)) == 10


def test_progress_adds_up_to_the_rows(write: Write) -> None:
    told: list[int] = []
    prepare(RowFiles([write(many(20))]), Preparation(), advance=told.append)
    assert told == [7, 7, 6]


def test_what_is_written_loads_as_it_was(write: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path, out = write(many()), tmp_path / "copy.parquet"
    prepare(RowFiles([path]), Preparation(out))
    config = DataConfig(max_prompt_length=1000)
    before, after = (load_prompts([file], tokenizer, config)[0] for file in (path, out))
    kept = [(each.text, each.data_source, each.ground_truth, each.extra_info) for each in after]
    assert kept == [(each.text, each.data_source, each.ground_truth, each.extra_info) for each in before]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"train": Path("a.jsonl")}, "name it \\*.parquet"),
        ({"train": Path("a.parquet"), "validation_share": 0.1}, "a split needs both"),
        ({"validation": Path("a.parquet"), "validation_share": 0.1}, "a split needs both"),
        ({"train": Path("a.parquet"), "validation": Path("b.parquet")}, "a split needs both"),
        ({"validation_share": 1.0}, "from 0 to below 1"),
    ],
)
def test_a_plan_that_contradicts_itself_is_told(settings: dict, fault: str) -> None:
    with pytest.raises(PromptDataError, match=fault):
        Preparation(**settings)


def test_lengths_need_a_tokenizer_with_a_chat_template(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    files = RowFiles([write(many(5))])
    with pytest.raises(PromptDataError, match="name the model"):
        prepare(files, Preparation(max_prompt_tokens=5))
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(NoChatTemplateError):
        prepare(files, Preparation(), bare)


def test_files_without_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(PromptDataError, match=r"no row in .*empty\.jsonl"):
        prepare(RowFiles([tmp_path / "empty.jsonl"]), Preparation())
