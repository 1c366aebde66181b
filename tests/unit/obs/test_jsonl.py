from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_dapo.obs.jsonl import (
    JsonlWriter,
    cut_from,
    deterministic_part,
    read_metrics,
    read_records,
    replace_file,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, steps, first_step=0, **values):
    writer = JsonlWriter(path, first_step)
    for step in steps:
        writer.write({"step": step, **values})
    writer.close()


def test_a_resumed_run_cuts_what_it_repeats(path):
    write(path, [0, 1, 2, 3, 4], a=1)
    write(path, [3, 4, 5], first_step=3, a=2)
    assert [(r["step"], r["a"]) for r in read_records(path)] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_several_records_of_one_step_are_cut_together(path):
    write(path, [1, 1, 2, 2, 2, 3])
    cut_from(path, 2)
    assert [r["step"] for r in read_records(path)] == [1, 1]


def test_a_torn_last_line_is_cut_and_not_read(path):
    write(path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "reward/me')
    assert [r["step"] for r in read_records(path)] == [1, 2]
    write(path, [], first_step=3)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ['{"step": 1', "[1]", '{"loss": 1}', '{"step": "1"}', ""])
def test_a_file_of_another_kind_is_refused_and_left_alone(path, line):
    text = f'{line}\n{{"step": 2}}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1: wanted a JSON object"):
        JsonlWriter(path, 0)
    assert path.read_text() == text


def test_each_line_is_on_disk_before_write_returns(path):
    writer = JsonlWriter(path, 0)
    writer.write({"step": 1, "x": 0.5})
    assert path.read_text() == '{"step": 1, "x": 0.5}\n'
    writer.close()


def test_floats_come_back_to_the_last_bit(path):
    values = np.random.default_rng(0).standard_normal(200)
    narrow = values.astype(np.float32)
    write(path, [1], **{f"d{i}": v for i, v in enumerate(values)}, **{f"s{i}": v for i, v in enumerate(narrow)})
    (record,) = read_metrics(path)
    assert [record[f"d{i}"] for i in range(200)] == values.tolist()
    assert [record[f"s{i}"] for i in range(200)] == narrow.tolist()


def test_whole_numbers_stay_whole_and_what_is_not_finite_stays_valid_json(path):
    write(path, [np.int64(1)], count=np.int32(7), nan=math.nan, up=math.inf, down=-math.inf)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw == {"step": 1, "count": 7, "nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    (record,) = read_metrics(path)
    assert math.isnan(record["nan"])
    assert (record["up"], record["down"]) == (math.inf, -math.inf)


def test_text_that_is_hard_to_encode_comes_back(path):
    hard = "two\nlines  ü 数学 \u2028 lone surrogate \ud800"
    write(path, [1], text=hard)
    assert read_records(path)[0]["text"] == hard
    assert "数学" in path.read_text()


def test_the_deterministic_part_leaves_out_time_memory_and_throughput():
    record = {"step": 1, "seconds/step": 2.0, "memory/resident": 1.0, "throughput/x": 3.0, "reward/mean": 0.5}
    assert deterministic_part(record) == {"step": 1, "reward/mean": 0.5}


def test_a_replaced_file_leaves_nothing_beside_it(tmp_path):
    replace_file(tmp_path / "a", "old")
    replace_file(tmp_path / "a", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]
