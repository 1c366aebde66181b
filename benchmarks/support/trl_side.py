"""TRL's GRPOTrainer(loss_type="dapo") on the run that a configuration of this project describes, as fast as it goes.

    python trl_side.py OUT.jsonl CONFIG.yaml [key=value ...]

Same checkpoint, prompts, chat template, reward, batch, optimizer updates a rollout and optimizer settings. Settings
chosen for speed: static KV cache (faster than the default here), no logging, no checkpoints, no gradient
checkpointing. TRL has no dynamic sampling, so `algorithm.filter_groups` has no counterpart. One line a rollout:
`step`, `response_length`, `accuracy`, and with `trainer.test_freq` the greedy accuracy on `data.val_files`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from megatron_dapo.algo.overlong import overlong_penalty
from megatron_dapo.config.load import load_config
from megatron_dapo.config.tree import RunConfig
from megatron_dapo.data.files import Row, read_rows
from megatron_dapo.obs.jsonl import JsonlWriter
from megatron_dapo.rewards.math_dapo import score

Chat = list[dict[str, str]]

EVAL_BATCH = 256


def main(out: Path, config: RunConfig) -> None:
    torch.set_num_threads(1)
    path = config.actor_rollout_ref.model.path
    tokenizer = AutoTokenizer.from_pretrained(path)
    lines = RolloutLines(out, config, tokenizer)
    rows = read_rows(config.data.train_files, config.data.prompt_key).distinct
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa"),
        reward_funcs=lines.reward,
        args=grpo_config(config, str(out.with_suffix(""))),
        train_dataset=Dataset.from_list([{"prompt": chat(row), "ground_truth": row.ground_truth} for row in rows]),
        processing_class=tokenizer,
        callbacks=[lines],
    )
    trainer.train()


def grpo_config(config: RunConfig, output_dir: str) -> GRPOConfig:
    """The same run in TRL's words. Its `max_steps` counts optimizer updates."""
    data, section = config.data, config.actor_rollout_ref
    actor, rollout, optim = section.actor, section.rollout, section.actor.optim
    assert config.trainer.total_training_steps is not None
    warm_up = optim.lr_warmup_steps * updates_per_rollout(config)
    return GRPOConfig(
        output_dir=output_dir,
        loss_type="dapo",
        epsilon=actor.clip_ratio_low,
        epsilon_high=actor.clip_ratio_high,
        beta=0.0,
        scale_rewards="group",
        num_generations=rollout.n,
        per_device_train_batch_size=actor.ppo_mini_batch_size * rollout.n,
        gradient_accumulation_steps=1,
        steps_per_generation=data.train_batch_size // actor.ppo_mini_batch_size,
        num_iterations=actor.ppo_epochs,
        max_steps=config.trainer.total_training_steps * updates_per_rollout(config),
        max_completion_length=data.max_response_length,
        mask_truncated_completions=config.reward_model.overlong_filtering,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=max(rollout.top_k, 0),
        cache_implementation="static",
        learning_rate=optim.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=warm_up,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=actor.grad_clip,
        shuffle_dataset=data.shuffle,
        seed=data.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def updates_per_rollout(config: RunConfig) -> int:
    actor = config.actor_rollout_ref.actor
    return config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs


class RolloutLines(TrainerCallback):
    """The reward, and at the end of each rollout's last update its line in the file."""

    def __init__(self, out: Path, config: RunConfig, tokenizer: PreTrainedTokenizerBase):
        self._writer = JsonlWriter(out, 0)
        self._config, self._tokenizer = config, tokenizer
        self._rollout: dict[str, float] = {}
        every = config.trainer.test_freq
        self._val_rows = read_rows(config.data.val_files, config.data.prompt_key).distinct if every > 0 else ()

    def reward(
        self, completions: Sequence[Chat], completion_ids: Sequence[list[int]], ground_truth: Sequence[str], **_: Any
    ) -> list[float | None]:
        scores = [score(c[0]["content"], truth) for c, truth in zip(completions, ground_truth, strict=True)]
        lengths = [len(ids) for ids in completion_ids]
        self._rollout = {
            "response_length": sum(lengths) / len(lengths),
            "accuracy": sum(each.acc for each in scores) / len(scores),
        }
        return [each.score + self._penalty(length) for each, length in zip(scores, lengths, strict=True)]

    def on_step_end(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        step, rest = divmod(state.global_step, updates_per_rollout(self._config))
        if rest:
            return
        line: dict[str, float] = {"step": step, **self._rollout}
        if self._val_rows and step % self._config.trainer.test_freq == 0:
            line["greedy_accuracy"] = self._greedy_accuracy(arguments["model"])
        self._writer.write(line)

    def _penalty(self, length: int) -> float:
        buffer = self._config.reward_model.overlong_buffer
        longest = self._config.data.max_response_length
        return overlong_penalty(length, longest, buffer.len, buffer.penalty_factor) if buffer.enable else 0.0

    @torch.no_grad()
    def _greedy_accuracy(self, model: Any) -> float:
        right = 0
        model.eval()
        for start in range(0, len(self._val_rows), EVAL_BATCH):
            rows = self._val_rows[start : start + EVAL_BATCH]
            inputs: Any = self._tokenizer.apply_chat_template(
                [chat(row) for row in rows],
                add_generation_prompt=True,
                padding=True,
                tokenizer_kwargs={"padding_side": "left"},
                return_tensors="pt",
                return_dict=True,
            )
            ids = model.generate(**inputs, max_new_tokens=self._config.data.max_response_length, do_sample=False)
            answers = self._tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(score(answer, row.ground_truth).acc for answer, row in zip(answers, rows, strict=True))
        model.train()
        return right / len(self._val_rows)


def chat(row: Row) -> Chat:
    return [{"role": role, "content": content} for role, content in row.messages]


if __name__ == "__main__":
    main(Path(sys.argv[1]), load_config(sys.argv[2], sys.argv[3:]).config)
