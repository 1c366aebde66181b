"""The examples for GPUs: the three runs of the DAPO recipe key by key, and that every example can be started.

What the recipe's runs set is transcribed here from arXiv 2503.14476 and the public recipe (verl, recipe/dapo, commit
4f80e465). `tests/data/recipe_overrides` has the same scripts' override lists, which are compared besides.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from megatron_dapo.cli import main
from megatron_dapo.config.check import check, planned_world_size
from megatron_dapo.config.convert import to_dict
from megatron_dapo.config.load import load_config
from megatron_dapo.config.recipe_keys import RECIPE_KEYS, Same
from megatron_dapo.config.tree import RunConfig

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
OVERRIDES = ROOT / "tests" / "data" / "recipe_overrides"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MEGATRON = f"{ACTOR}.megatron"

GPUS = {
    "dapo_qwen2.5_32b": 128,
    "dapo_wo_ds_qwen2.5_32b": 128,
    "dapo_early_qwen2.5_32b": 128,
    "dapo_qwen2.5_7b": 8,
    "dapo_qwen3_1.7b": 1,
}
OVERRIDES_OF = {
    "dapo_qwen2.5_32b": "full",
    "dapo_wo_ds_qwen2.5_32b": "without_dynamic_sampling",
    "dapo_early_qwen2.5_32b": "early",
}
COMMON: Mapping[str, Any] = {
    # 512 prompts x 16 responses a step, 32 prompts an update: 16 updates, one epoch over them
    "data.train_batch_size": 512,
    f"{ROLLOUT}.n": 16,
    f"{ACTOR}.ppo_mini_batch_size": 32,
    f"{ACTOR}.ppo_epochs": 1,
    # prompts of at most 2048 tokens, cut on the left; responses of at most 20480, the last 4096 of them the buffer
    "data.prompt_key": "prompt",
    "data.truncation": "left",
    "data.filter_overlong_prompts": False,
    "data.max_prompt_length": 2048,
    "data.max_response_length": 20480,
    "reward_model.reward_manager": "dapo",
    "reward_model.default_verifier": "math_dapo",
    "reward_model.fallback_boxed": False,
    "reward_model.strict_box_verify": False,
    "reward_model.overlong_filtering": False,
    "reward_model.overlong_buffer.enable": True,
    "reward_model.overlong_buffer.len": 4096,
    "reward_model.overlong_buffer.penalty_factor": 1.0,
    # the objective
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_ctrl.kl_coef": 0.0,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.kl_loss_coef": 0.0,
    f"{ACTOR}.entropy_coeff": 0.0,
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.28,
    f"{ACTOR}.clip_ratio_c": 10.0,
    f"{ACTOR}.old_log_prob": "recompute",
    f"{ACTOR}.rollout_correction.tis_cap": None,
    f"{ACTOR}.gspo.enable": False,
    # AdamW; 10 rollout steps of warmup from 0; every parameter decays
    f"{ACTOR}.optim.lr": 1e-6,
    f"{ACTOR}.optim.lr_warmup_steps": 10,
    f"{ACTOR}.optim.lr_warmup_from_zero": True,
    f"{ACTOR}.optim.lr_decay_style": "constant",
    f"{ACTOR}.optim.weight_decay": 0.1,
    f"{ACTOR}.optim.weight_decay_all": True,
    f"{ACTOR}.optim.betas": (0.9, 0.999),
    f"{ACTOR}.optim.eps": 1e-8,
    f"{ACTOR}.grad_clip": 1.0,
    # sampling in training and in evaluation
    f"{ROLLOUT}.temperature": 1.0,
    f"{ROLLOUT}.top_p": 1.0,
    f"{ROLLOUT}.top_k": -1,
    f"{ROLLOUT}.enforce_eager": True,
    f"{ROLLOUT}.val_kwargs.temperature": 1.0,
    f"{ROLLOUT}.val_kwargs.top_p": 0.7,
    f"{ROLLOUT}.val_kwargs.top_k": -1,
    f"{ROLLOUT}.val_kwargs.do_sample": True,
    f"{ROLLOUT}.val_kwargs.n": 1,
    # evaluated before training and every 5 steps, saved every 5
    "trainer.val_before_train": True,
    "trainer.test_freq": 5,
    "trainer.save_freq": 5,
    "trainer.total_epochs": 1,
    "trainer.resume_mode": "auto",
    "trainer.nnodes": 16,
    "trainer.n_gpus_per_node": 8,
}
OF_RUN: Mapping[str, Mapping[str, Any]] = {
    "dapo_qwen2.5_32b": {
        "data.gen_batch_size": 1536,
        "algorithm.filter_groups.enable": True,
        "algorithm.filter_groups.metric": "acc",
        "algorithm.filter_groups.max_num_gen_batches": 10,
        "algorithm.filter_groups.on_exhausted": "error",
        "algorithm.filter_groups.surplus": "discard",
        f"{ACTOR}.loss_agg_mode": "token-mean",
    },
    "dapo_wo_ds_qwen2.5_32b": {
        "data.gen_batch_size": 512,
        "algorithm.filter_groups.enable": False,
        f"{ACTOR}.loss_agg_mode": "token-mean",
    },
    "dapo_early_qwen2.5_32b": {
        "data.gen_batch_size": 512,
        "algorithm.filter_groups.enable": False,
        f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
    },
}
# Keys of the scripts that are another thing here: docs/recipe.md gives the reasons.
PLACES = {
    "data.train_files",
    "data.val_files",
    "actor_rollout_ref.model.path",
    "trainer.default_local_dir",
    "trainer.project_name",
    "trainer.experiment_name",
}
OWN_LAYOUT = {f"{MEGATRON}.context_parallel_size": (8, 1), f"{MEGATRON}.optimizer_cpu_offload": (True, False)}


def example(name: str, *overrides: str) -> RunConfig:
    return load_config(str(EXAMPLES / name / "config.yaml"), overrides).config


def at(config: RunConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


@pytest.mark.parametrize("name", OF_RUN)
def test_a_run_of_the_recipe_has_each_of_its_settings(name: str) -> None:
    config = example(name)
    wanted = {**COMMON, **OF_RUN[name]}
    assert {key: at(config, key) for key in wanted} == wanted


@pytest.mark.parametrize("name", OF_RUN)
def test_what_a_run_sets_otherwise_than_the_scripts_overrides_is_listed(name: str) -> None:
    overrides = (OVERRIDES / f"{OVERRIDES_OF[name]}.txt").read_text().splitlines()
    recipe, ours = load_config(None, overrides).config, example(name)
    keys = {line.split("=", 1)[0] for line in overrides}
    same = {key for key in keys if isinstance(RECIPE_KEYS[key], Same)} - PLACES
    recompute = {f"{MEGATRON}.recompute_{part}" for part in ("granularity", "method", "num_layers")}
    assert {key: at(ours, key) for key in same | recompute} == {key: at(recipe, key) for key in same | recompute}
    assert {key: (at(recipe, key), at(ours, key)) for key in OWN_LAYOUT} == OWN_LAYOUT


def test_the_three_runs_differ_in_what_the_recipe_says_alone() -> None:
    full, *others = (flat(to_dict(example(name))) for name in OF_RUN)
    named = {"trainer.experiment_name", "trainer.default_local_dir"}
    filtering = {
        f"algorithm.filter_groups.{key}" for key in ("enable", "max_num_gen_batches", "on_exhausted", "surplus")
    }
    own = {"dapo_wo_ds_qwen2.5_32b": set(), "dapo_early_qwen2.5_32b": {f"{ACTOR}.loss_agg_mode"}}
    for other, more in zip(others, own.values(), strict=True):
        assert {key for key in full if full[key] != other[key]} == named | filtering | {"data.gen_batch_size"} | more


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_an_example_fits_its_gpus_with_either_engine(name: str, engine: str) -> None:
    config = example(name, f"actor_rollout_ref.rollout.name={engine}")
    assert planned_world_size(config) == GPUS[name]
    check(config, GPUS[name])
    assert example(name).actor_rollout_ref.rollout.name == "sglang"


@pytest.mark.parametrize("name", GPUS)
def test_a_dry_run_of_an_example_needs_no_model_and_no_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(EXAMPLES / name / "config.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    [world] = [line for line in printed.splitlines() if line.startswith("world size")]
    assert world.split()[2] == str(GPUS[name])


@pytest.mark.parametrize("name", GPUS)
def test_a_run_script_starts_its_own_configuration_under_the_recipes_variables(name: str, tmp_path: Path) -> None:
    words, environment = started(name, tmp_path, {"MODEL_PATH": "/m", "TRAIN_FILE": "/t.parquet", "CKPTS_DIR": "/c"})
    config, overrides = words[0], [word for word in words[1:] if word != "train"]
    assert config.endswith(f"examples/{name}/config.yaml")
    loaded = example(name, *overrides)
    assert loaded.actor_rollout_ref.model.path == "/m"
    assert loaded.data.train_files == ("/t.parquet",)
    assert loaded.data.val_files == (f"{tmp_path}/data/aime-2024.parquet",)
    assert loaded.trainer.default_local_dir == "/c"
    assert loaded.trainer.total_epochs == 3, "words behind the script are settings"
    check(loaded, GPUS[name])
    if name in OF_RUN:
        assert environment["RAY_ADDRESS"] == "http://localhost:8265"
        assert environment["RUNTIME_ENV"] == f"{environment['WORKING_DIR']}/launch/runtime_env.yaml"
        assert config == f"examples/{name}/config.yaml", "below the folder that goes to the nodes"


@pytest.mark.parametrize("folder", sorted(path.parent for path in EXAMPLES.glob("*/config.yaml")), ids=lambda p: p.name)
def test_an_example_has_a_page_and_something_to_start(folder: Path) -> None:
    scripts = [folder / name for name in ("run.sh", "run.py") if (folder / name).is_file()]
    assert scripts
    assert all(os.access(script, os.X_OK) for script in scripts if script.suffix == ".sh")
    page = (folder / "README.md").read_text()
    assert any(script.name in page for script in scripts) or "make train" in page


def started(name: str, tmp_path: Path, variables: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """What a copy of the run script, beside stand-ins of what it starts, would start: words and environment."""
    script = tmp_path / "examples" / name / "run.sh"
    for path in (tmp_path / "launch" / "submit.sh", tmp_path / "launch" / "torchrun.sh", tmp_path / "megatron-dapo"):
        path.parent.mkdir(exist_ok=True)
        path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >words\nenv >environment\n')
        path.chmod(0o755)
    shutil.copy(ROOT / "launch" / "submit_32b.sh", tmp_path / "launch")
    script.parent.mkdir(parents=True)
    script.write_text((EXAMPLES / name / "run.sh").read_text())
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    subprocess.run(["bash", script, "trainer.total_epochs=3"], check=True, cwd=tmp_path, env=environment)
    lines = (tmp_path / "environment").read_text().splitlines()
    words = (tmp_path / "words").read_text().splitlines()
    return words[1:] if words[0] == "train" else words, dict(line.split("=", 1) for line in lines)


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return leaves
