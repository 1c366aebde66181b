"""The program and its shell script as a user starts them, against a server that answers as the hub does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dapo.data.prepare.hub import KNOWN
from megatron_dapo.data.prepare.rows import PROBLEM_SCHEMA, recipe_row
from tests.unit.data.prepare.hub_server import COMMIT, Hub, serve

ROOT = Path(__file__).parents[3]
PROGRAM = [sys.executable, str(ROOT / "tools" / "prepare_dapo_data.py")]


def parquet(problems: int, repeats: int) -> bytes:
    rows = [recipe_row(f"{number}+1?", str(number + 1), "math_dapo", number) for number in range(problems)]
    table = pa.Table.from_pylist(rows * repeats, PROBLEM_SCHEMA)
    pq.write_table(table, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    contents = {"dapo-math-17k": parquet(50, 4), "aime-2024": parquet(3, 32)}
    with serve(Hub({f"{file.repository}/{file.path}": contents[name] for name, file in KNOWN.items()})) as hub:
        yield hub


def run(command: list[str], hub: Hub, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    own: Mapping[str, str] = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **variables,
    }
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, cwd=folder)


def test_a_data_set_of_the_recipe_is_downloaded_counted_and_written(hub: Hub, tmp_path: Path) -> None:
    command = [*PROGRAM, "dapo-math-17k", "--train", "out.parquet", "--deduplicate", "--json", "report.json"]
    ended = run(command, hub, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "duplicate rows     150 (a prompt stands in 4 to 4 rows, median 4)" in ended.stdout
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 50
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows"], report["distinct"]) == (200, 50)
    found = report["from_hub"]["dapo-math-17k"]
    assert (found["commit"], found["verified"]) == (COMMIT, True)

    again = run(command, hub, tmp_path)
    assert again.returncode == 2
    assert "out.parquet is there already" in again.stderr


def test_what_cannot_be_downloaded_is_told_and_nothing_written(hub: Hub, tmp_path: Path) -> None:
    ended = run([*PROGRAM, "aime-2024", "--train", "out.parquet", "--revision", "nowhere"], hub, tmp_path)
    assert ended.returncode == 1
    assert "BytedTsinghua-SIA/AIME-2024 (revision nowhere) is not there" in ended.stderr
    assert not (tmp_path / "out.parquet").exists()


def test_local_problems_become_rows_of_the_recipe(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "1+1?", "answer": "2", "set": "sums"}) + "\n")
    ended = run(
        [*PROGRAM, "a.jsonl", "--problem-key", "q", "--source-key", "set", "--train", "a.parquet"], hub, tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == [recipe_row("1+1?", "2", "sums", 0)]
    assert not hub.requests


def test_the_script_makes_both_files_and_leaves_those_that_are_there(hub: Hub, tmp_path: Path) -> None:
    script, train, test = (
        [str(ROOT / "launch" / "prepare_dapo_data.sh")],
        tmp_path / "t.parquet",
        tmp_path / "e.parquet",
    )
    files = {"TRAIN_FILE": str(train), "TEST_FILE": str(test)}
    test.write_text("mine")
    ended = run(script, hub, tmp_path, **files)
    assert ended.returncode == 0, ended.stderr
    assert pq.read_metadata(train).num_rows == 200
    assert test.read_text() == "mine"

    ended = run(script, hub, tmp_path, **files, OVERWRITE="1")
    assert ended.returncode == 0, ended.stderr
    assert pq.read_metadata(test).num_rows == 96
