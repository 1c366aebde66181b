"""CPU-seconds and tokens a second of the embedded engine against transformers' `generate`, on the same requests.

    OMP_NUM_THREADS=1 python benchmarks/rollout_engine.py --json rollout_engine.json

One tiny Qwen2 model with random weights, groups of responses to prompts of unequal length, sampled at temperature 1,
each response with a length of its own that both sides are held to: both write the same number of tokens. The two take
turns in one process; CPU-seconds are the process's own (`time.process_time`), so what else the machine does shifts
them far less than wall time. The engine's time includes its log-probs; `generate` returns none here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, StoppingCriteria, StoppingCriteriaList

from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.types import Request, SamplingParams


@dataclass(frozen=True)
class Work:
    """Lengths are drawn uniformly between their bounds, both included."""

    prompts: int = 16
    samples: int = 8
    shortest_prompt: int = 12
    longest_prompt: int = 20
    shortest_response: int = 10
    longest_response: int = 30
    vocab: int = 48
    hidden: int = 128
    layers: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds, of one batch of requests."""

    name: str
    cpu_seconds: float
    wall_seconds: float
    tokens: int
    tokens_per_cpu_second: float


class RowLimits(StoppingCriteria):
    """Ends each row of a `generate` batch at its own number of new tokens."""

    def __init__(self, limits: list[int], prompt_columns: int):
        self._ends = torch.tensor(limits) + prompt_columns

    def __call__(
        self, input_ids: torch.LongTensor, scores: tuple[torch.FloatTensor] | None, **kwargs: object
    ) -> torch.BoolTensor:
        return cast(torch.BoolTensor, input_ids.shape[1] >= self._ends)


def make_model(work: Work) -> PreTrainedModel:
    torch.manual_seed(work.seed)
    config = Qwen2Config(
        vocab_size=work.vocab,
        hidden_size=work.hidden,
        intermediate_size=4 * work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // 32,
        num_key_value_heads=max(1, work.hidden // 64),
        max_position_embeddings=work.longest_prompt + work.longest_response,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def make_requests(work: Work) -> list[Request]:
    rng = np.random.default_rng(work.seed)
    out: list[Request] = []
    for draw in range(work.prompts):
        prompt = rng.integers(1, work.vocab, rng.integers(work.shortest_prompt, work.longest_prompt + 1))
        for sample in range(work.samples):
            tokens = int(rng.integers(work.shortest_response, work.longest_response + 1))
            out.append(Request(draw, sample, prompt, len(out), SamplingParams(max_tokens=tokens)))
    return out


def with_engine(model: PreTrainedModel, requests: list[Request]) -> Callable[[], int]:
    """A function that runs the requests once and returns the tokens written."""
    engine = TorchEngine(model.config, (), max_num_seqs=len(requests), device="cpu", dtype=torch.float32)
    engine.load_weights(model.named_parameters(), version=0)

    def once() -> int:
        engine.submit(requests)
        tokens = 0
        while engine.pending:
            tokens += sum(len(completion.token_ids) for completion in engine.poll())
        return tokens

    return once


def with_generate(model: PreTrainedModel, requests: list[Request]) -> Callable[[], int]:
    """The same through `generate`: one left-padded batch, as TRL sends it."""
    columns = max(len(r.prompt_ids) for r in requests)
    ids = torch.zeros(len(requests), columns, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, columns - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids)
        mask[row, columns - len(request.prompt_ids) :] = 1
    limits = [r.params.max_tokens for r in requests]
    stop = StoppingCriteriaList([RowLimits(limits, columns)])

    def once() -> int:
        with torch.inference_mode():
            out = model.generate(  # pyright: ignore[reportCallIssue]
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=max(limits),
                pad_token_id=0,
                stopping_criteria=stop,
            )
        assert out.shape[1] == columns + max(limits)
        return sum(limits)

    return once


def measure(runs: dict[str, Callable[[], int]], rounds: int) -> list[Measured]:
    """All runs in turns, `rounds` times after one that does not count."""
    tokens = {name: run() for name, run in runs.items()}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            run()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
    out: list[Measured] = []
    for name in runs:
        seconds = statistics.median(cpu[name])
        out.append(Measured(name, seconds, statistics.median(wall[name]), tokens[name], tokens[name] / seconds))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded engine against transformers' generate.")
    parser.add_argument("--json", type=Path, help="write the same numbers to this file")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    work = Work()
    model, requests = make_model(work), make_requests(work)
    parameters = sum(p.numel() for p in model.parameters())
    runs = {"engine": with_engine(model, requests), "generate": with_generate(model, requests)}
    engine, generate = measure(runs, arguments.rounds)
    ratio = generate.cpu_seconds / engine.cpu_seconds

    table = Table(title=f"{len(requests)} responses, {parameters:,} parameters, {torch.get_num_threads()} thread(s)")
    for column in ("", "CPU-seconds", "wall seconds", "tokens", "tokens per CPU-second"):
        table.add_column(column, justify="right")
    for m in (engine, generate):
        table.add_row(
            m.name, f"{m.cpu_seconds:.3f}", f"{m.wall_seconds:.3f}", f"{m.tokens}", f"{m.tokens_per_cpu_second:.0f}"
        )
    console = Console()
    console.print(table)
    console.print(f"generate / engine, CPU-seconds: {ratio:.2f} (medians of {arguments.rounds} rounds, in turns)")
    if arguments.json:
        result = {
            "work": asdict(work),
            "parameters": parameters,
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "engine": asdict(engine),
            "generate": asdict(generate),
            "cpu_seconds_ratio": ratio,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
