"""The base model: a Qwen2 of about a million parameters over single characters, warmed up by supervision.

Written as an ordinary Hugging Face checkpoint. Also what tests a checkpoint from outside: transformers' own
`generate`, and nothing of megatron_dapo but the verifier.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from problems import Problem, Split
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from megatron_dapo.rewards.math_dapo import score

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
BYTE_LEVEL = {" ": "Ġ", "\n": "Ċ"}  # how Qwen2's tokenizer writes these bytes
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
MAX_RESPONSE = 32  # tokens, as in config.yaml

WARMUP_STEPS, BATCH, PEAK_LR = 300, 128, 2e-3


def build_tokenizer() -> Qwen2Tokenizer:
    """A token a character."""
    tokens = [*SPECIAL, *(BYTE_LEVEL.get(character, character) for character in CHARACTERS)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        unk_token=SPECIAL[2],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """Random weights. Heads and vocabulary can be split over 2 or 4 ranks."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=-(-len(tokenizer) // 4) * 4,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            initializer_range=0.05,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL.index("<pad>"),
            eos_token_id=SPECIAL.index("<eos>"),
            bos_token_id=None,
        )
    )


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Split,
    seed: int,
    report: Callable[[int, float], None],
    steps: int = WARMUP_STEPS,
) -> None:
    """Imitate demonstrations; `report` is told each step and its loss."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01)
    model.train()
    for step in range(1, steps + 1):
        batch = rng.choices(problems.warmup, k=BATCH)
        loss = _imitation_loss(model, tokenizer, batch, [problem.demonstration(rng) for problem in batch])
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(step / 20, 1.0, 1.05 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step, loss.item())


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def greedy_accuracy(path: Path, problems: Sequence[Problem]) -> float:
    """Share of right answers of the checkpoint at `path`, loaded and decoded by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = [_prompt(tokenizer, problem) for problem in problems]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=MAX_RESPONSE, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [score(text, str(problem.answer)).acc for text, problem in zip(answers, problems, strict=True)]
    return sum(right) / len(right)


def _prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    messages = [{"role": "user", "content": problem.question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _imitation_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], responses: Sequence[str]
) -> torch.Tensor:
    """Mean cross entropy over the responses' tokens."""
    prompts = [_prompt(tokenizer, problem) for problem in problems]
    texts = [p + r + str(tokenizer.eos_token) for p, r in zip(prompts, responses, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100  # a token a character
    logits = model(**batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
