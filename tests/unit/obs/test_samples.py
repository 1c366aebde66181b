from __future__ import annotations

import numpy as np
import pytest

from megatron_dapo.obs.jsonl import read_records
from megatron_dapo.obs.samples import SampleLog, chosen
from megatron_dapo.types import Completion, Group, Prompt, RewardResult, Sample


def decode(ids) -> str:
    return "".join(chr(i) for i in ids)


def make_group(draw_index: int, responses: list[str]) -> Group:
    samples = []
    for i, text in enumerate(responses):
        ids = np.array([ord(c) for c in text])
        completion = Completion(draw_index, i, ids, np.zeros(len(ids), np.float32), "stop", 3)
        result = RewardResult("ok", 1.0, {"score": 1.0, "acc": 1.0}, pred="4")
        samples.append(Sample(completion, result, -0.25, 0.75))
    return Group(draw_index, Prompt(9, np.array([1]), "2+2=", "sums", "4"), tuple(samples), 3)


def test_a_line_holds_all_that_was_judged_of_a_response(tmp_path):
    log = SampleLog(tmp_path / "samples.jsonl", 8, decode, first_step=0)
    log.write(5, [make_group(17, ["Answer: 4", "abababab"])])
    log.close()
    first, second = read_records(tmp_path / "samples.jsonl")
    assert first == {
        "step": 5,
        "draw_index": 17,
        "sample_index": 0,
        "data_source": "sums",
        "prompt": "2+2=",
        "response": "Answer: 4",
        "ground_truth": "4",
        "prediction": "4",
        "status": "ok",
        "detail": "",
        "score": 1.0,
        "accuracy": 1.0,
        "overlong_penalty": -0.25,
        "reward": 0.75,
        "length": 9,
        "finish_reason": "stop",
        "repetition": 0.0,
        "weight_version": 3,
    }
    assert (second["sample_index"], second["repetition"]) == (1, pytest.approx(3 / 5))


@pytest.mark.parametrize(
    "limit, expected", [(0, []), (2, [10, 10]), (3, [10] * 3), (5, [10] * 3), (6, [10] * 3 + [11] * 3), (99, None)]
)
def test_whole_groups_are_chosen_in_draw_order_whatever_order_they_come_in(limit, expected):
    groups = [make_group(index, ["a", "b", "c"]) for index in (12, 10, 11)]
    found = [group.draw_index for group, _ in chosen(groups, limit)]
    assert found == (expected if expected is not None else [10] * 3 + [11] * 3 + [12] * 3)


def test_a_resumed_run_writes_the_samples_of_a_step_once(tmp_path):
    for first_step, steps in ((0, (1, 2)), (2, (2, 3))):
        log = SampleLog(tmp_path / "samples.jsonl", 8, decode, first_step)
        for step in steps:
            log.write(step, [make_group(step, ["a", "b"])])
        log.close()
    assert [record["step"] for record in read_records(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3]
