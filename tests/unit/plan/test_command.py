"""`megatron-dapo plan` as it is typed, on a folder with nothing but a config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dapo.cli import main

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def words(model: Path, *more: str) -> list[str]:
    return [
        "plan",
        f"actor_rollout_ref.model.path={model}",
        "data.train_batch_size=16",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.megatron.params_dtype=bfloat16",
        "actor_rollout_ref.rollout.name=sglang",
        *more,
    ]


def test_it_prints_the_plan_and_writes_it_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model / "plan.json"
    code = main(words(model, "--gpu", "h20", "--nodes", "1", "--gpus-per-node", "2", "--json", str(out)))
    said = capsys.readouterr().out
    assert code == 0
    for part in ("1 x 2 h20: TP1 PP1 CP1 DP2", "Memory of a GPU", "A training step", "adaptive", "never held against"):
        assert part in said
    found = json.loads(out.read_text())
    (stage,) = found["memory"]["stages"]
    assert stage["held"]["weights"] == pytest.approx(2 * 1_543_714_304, rel=1e-6)  # the checkpoint's own count
    assert set(found["policies"]) == {"rounds", "adaptive", "oversample", "partial"}
    assert found["seconds"]["step"] == pytest.approx(sum(v for k, v in found["seconds"].items() if k != "step"))


def test_a_run_that_does_not_fit_ends_with_another_exit_code(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(model, "--gpus-per-node", "2", "actor_rollout_ref.rollout.gpu_memory_utilization=0.95")) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_search_prints_a_table_of_layouts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(model, "--search", "--gpus-per-node", "2")) == 0
    assert "fastest of" in capsys.readouterr().out


def test_a_run_that_was_logged_says_how_long_responses_are(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": 1, "draw_index": d, "length": 50 + 20 * d + s} for d in range(4) for s in range(4)]
    (model / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (model / "metrics.jsonl").write_text(json.dumps({"step": 1, "sampling/kept_share": 0.5}) + "\n")
    assert main(words(model, "--gpus-per-node", "2", "--samples", str(model / "samples.jsonl"))) == 0
    assert "responses of 82 on average (at most 1024), 50% of groups kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["actor_rollout_ref.model.path=nowhere"], "has no config.json"),
        (["--gpu", "gtx"], "--gpu gtx"),
        (["--assume", "luck=1"], "no assumption 'luck'"),
        (["--json", "/nowhere/x.json", "--gpus-per-node", "2"], "--json /nowhere/x.json cannot be written"),
        (["actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=3"], "not divisible"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(words(model, *more)) == 2
    assert said in capsys.readouterr().err
