"""Rows made into prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_dapo.config.tree import DataConfig
from megatron_dapo.data.files import MalformedRowError
from megatron_dapo.data.prompts import (
    EmptyDatasetError,
    NoChatTemplateError,
    PromptDataset,
    PromptTooLongError,
    load_prompts,
)
from tests.unit.data.fakes import dataset, row

Write = Callable[..., Path]
FRAME = len("<user><assistant>")
WIDE = DataConfig(max_prompt_length=100)


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_the_chat_template_is_applied_with_the_generation_prompt_and_no_other_special_token(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts, _ = load_prompts([write([row("1+1", "2")])], tokenizer, WIDE)
    [prompt] = prompts
    assert prompt.text == "<user>1+1<assistant>"
    assert prompt.token_ids.tolist() == ids("<user>1+1<assistant>")
    assert (prompt.index, prompt.data_source, prompt.ground_truth) == (0, "math_dapo", "2")
    assert prompt.extra_info == {"index": "id of 1+1"}


@pytest.mark.parametrize(
    "truncation, text",
    [("left", "t>"), ("right", "<u"), ("middle", "<>")],
)
def test_a_long_prompt_is_cut_at_the_side_that_is_named(
    write: Write, tokenizer: PreTrainedTokenizerFast, truncation: str, text: str
) -> None:
    config = DataConfig(max_prompt_length=2, truncation=truncation)
    prompts, report = load_prompts([write([row("x"), row("x")])], tokenizer, config)
    assert [p.token_ids.tolist() for p in prompts] == [ids(text)] * 2
    assert prompts[0].text == "<user>x<assistant>"
    assert (report.too_long, report.kept, report.longest) == (2, 2, FRAME + 1)
    assert f"2 rows over 2 tokens truncated ({truncation})" in str(report)


def test_the_middle_cut_keeps_the_odd_token_at_the_end(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(max_prompt_length=5, truncation="middle")
    prompts, _ = load_prompts([write([row("x")])], tokenizer, config)
    assert prompts[0].token_ids.tolist() == ids("<u" + "nt>")


def test_a_prompt_of_just_the_limit_is_whole(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(max_prompt_length=FRAME + 1, truncation="error")
    prompts, report = load_prompts([write([row("x")])], tokenizer, config)
    assert (len(prompts[0].token_ids), report.too_long) == (FRAME + 1, 0)


def test_truncation_error_names_the_row_and_both_lengths(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([row("x"), row("xy")])
    with pytest.raises(
        PromptTooLongError, match=rf"{path.name} (row 1|line 2).*has 19 tokens and .*max_prompt_length=18"
    ):
        load_prompts([path], tokenizer, DataConfig(max_prompt_length=18, truncation="error"))


def test_long_prompts_can_be_left_out_and_positions_close_up(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([row("a"), row("long" * 30), row("b"), row("long" * 30)])
    prompts, report = load_prompts([path], tokenizer, DataConfig(max_prompt_length=50, filter_overlong_prompts=True))
    assert [(p.index, p.text) for p in prompts] == [(0, "<user>a<assistant>"), (1, "<user>b<assistant>")]
    assert (report.rows, report.too_long, report.kept) == (4, 2, 2)
    assert "2 rows over 50 tokens left out" in str(report)


def test_all_prompts_too_long_is_an_error_with_the_lengths(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([row("a"), row("abc")])
    with pytest.raises(
        EmptyDatasetError, match=r"all 2 prompts .*max_prompt_length=5.*shortest has 18, the longest 20"
    ):
        load_prompts([path], tokenizer, DataConfig(max_prompt_length=5, filter_overlong_prompts=True))


def test_duplicates_are_reported_and_kept(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    one, two = write([row("a"), row("b"), row("a")], "one"), write([row("a", "other answer")], "two")
    prompts, report = load_prompts([one, two], tokenizer, WIDE)
    assert [p.ground_truth for p in prompts] == ["1", "1", "1", "other answer"]
    assert [p.index for p in prompts] == [0, 1, 2, 3]
    assert (report.rows, report.distinct, report.kept) == (4, 2, 4)
    assert "4 rows, 2 distinct, each 2.0 times on average" in str(report)


def test_each_text_is_tokenised_once(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    class CountingTokenizer(PreTrainedTokenizerFast):
        texts = 0

        def __call__(self, *args, **kwargs):
            CountingTokenizer.texts += len(args[0])
            return super().__call__(*args, **kwargs)

    counting = CountingTokenizer(tokenizer_object=tokenizer.backend_tokenizer, chat_template=tokenizer.chat_template)
    load_prompts([write([row("a"), row("b", "2"), row("b", "3")] * 50)], counting, WIDE)
    assert CountingTokenizer.texts == 2


def test_a_tokenizer_without_a_chat_template_is_refused_with_what_to_do(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(NoChatTemplateError, match=r"has no chat template.*chat_template\.jinja"):
        load_prompts([write([row("a")])], bare, WIDE)


def test_a_row_that_the_template_refuses_is_named(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([row("a"), row("b", prompt=[{"role": "tool", "content": "x"}])])
    with pytest.raises(MalformedRowError, match=rf"{path.name} .*the roles tool \(no tools\); change the row"):
        load_prompts([path], tokenizer, WIDE)


def test_an_empty_dataset_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(EmptyDatasetError, match=r"no row in .*train\.jsonl"):
        load_prompts([tmp_path / "train.jsonl"], tokenizer, WIDE)
    with pytest.raises(EmptyDatasetError, match=r"no row in the files \(none is named\)"):
        load_prompts([], tokenizer, WIDE)


def test_a_dataset_is_a_sequence() -> None:
    prompts = dataset(5)
    assert [p.index for p in prompts] == [p.index for p in prompts[:]] == [0, 1, 2, 3, 4]
    assert (prompts[-1].index, [p.index for p in prompts[1:3]]) == (4, [1, 2])
    with pytest.raises(IndexError):
        prompts[5]


def test_the_fingerprint_tells_datasets_apart() -> None:
    base = dataset(5)
    reordered = PromptDataset(base.distinct, base.rows[::-1].copy())
    shorter = PromptDataset(base.distinct, base.rows[:4])
    prints = {d.fingerprint for d in [base, reordered, shorter, dataset(6)]}
    assert len(prints) == 4
    assert dataset(5).fingerprint == base.fingerprint
    assert PromptDataset(base.distinct, np.arange(5)).fingerprint == base.fingerprint
