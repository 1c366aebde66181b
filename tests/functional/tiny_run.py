"""A workspace in which whole runs take seconds: a random model, character tokens, prompts, and a reward that varies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from tests.functional.tiny_models import save_tiny_model

CHARACTERS = [chr(code) for code in range(32, 90)]  # with the three special tokens as many as tiny_models.VOCAB
BYTE_LEVEL = {" ": "Ġ"}

# Scores differ within a group and depend on nothing but the text. Half a millisecond to some milliseconds of real,
# random delay: results arrive in another order each time.
REWARD = """
import random, time, zlib
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    time.sleep(random.SystemRandom().random() * 0.004)
    right = zlib.crc32((solution_str + ground_truth).encode()) % 3 == 0
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str[:4]}
"""


def make_workspace(root: Path, family: str = "qwen2", tied: bool = False, width: int = 32, heads: int = 8) -> Path:
    """Fill `root` with model, data, reward.py and config.yaml; returns the config's path."""
    save_tiny_model(root / "model", family, tied, width=width, heads=heads)
    save_tokenizer(root / "model")
    write_prompts(root / "train.jsonl", 24)
    write_prompts(root / "val.jsonl", 4)
    (root / "reward.py").write_text(REWARD)
    settings: dict[str, Any] = {
        "data": {
            "train_files": [str(root / "train.jsonl")],
            "val_files": [str(root / "val.jsonl")],
            "max_prompt_length": 12,
            "max_response_length": 10,
            "train_batch_size": 4,
            "gen_batch_size": 4,
        },
        "algorithm": {"filter_groups": {"enable": True, "metric": "acc", "max_num_gen_batches": 10}},
        "actor_rollout_ref": {
            "model": {"path": str(root / "model")},
            "actor": {
                "ppo_mini_batch_size": 2,
                "ppo_max_token_len_per_gpu": 64,
                "optim": {"lr": 1e-3, "eps": 1e-4, "lr_warmup_steps": 2},
            },
            "rollout": {"n": 4},
        },
        "reward_model": {"overlong_buffer": {"enable": True, "len": 4}},
        "custom_reward_function": {"path": str(root / "reward.py")},
        "trainer": {"total_training_steps": 3, "default_local_dir": str(root / "run"), "logger": []},
    }
    config = root / "config.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    return config


def save_tokenizer(path: Path) -> None:
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocab |= {BYTE_LEVEL.get(c, c): i + 3 for i, c in enumerate(CHARACTERS)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(path)


def write_prompts(path: Path, count: int) -> None:
    rows = [
        {
            "data_source": "tiny",
            "prompt": [{"role": "user", "content": f"{number} PLUS {number * 7 % 11}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(number + number * 7 % 11)},
            "extra_info": {"index": number},
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
