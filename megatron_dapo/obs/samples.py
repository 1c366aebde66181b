"""`samples.jsonl`: responses to read, a few a step, each with all that was judged of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dapo.algo.repetition import ngram_repetition
from megatron_dapo.obs.jsonl import JsonlWriter
from megatron_dapo.types import Group, IntArray, Sample


class SampleLog:
    """Writes at most `limit` samples a step into `path`; what stands there from `first_step` on is cut.

    `decode` turns response tokens [R] into text.
    """

    def __init__(self, path: Path, limit: int, decode: Callable[[IntArray], str], first_step: int) -> None:
        self._writer = JsonlWriter(path, first_step)
        self._limit, self._decode = limit, decode

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """The samples that `chosen` picks from the step's groups, one line each."""
        for group, sample in chosen(groups, self._limit):
            self._writer.write({"step": step, **sample_record(group, sample, self._decode)})

    def close(self) -> None:
        self._writer.close()


def chosen(groups: Sequence[Group], limit: int) -> list[tuple[Group, Sample]]:
    """Whole groups in draw order while all fit into `limit`; of a first group that does not fit, its first samples."""
    rows: list[tuple[Group, Sample]] = []
    for group in sorted(groups, key=lambda group: group.draw_index):
        if rows and len(rows) + len(group.samples) > limit:
            break
        rows += [(group, sample) for sample in group.samples]
    return rows[:limit]


def sample_record(group: Group, sample: Sample, decode: Callable[[IntArray], str]) -> dict[str, Any]:
    """Plain values of one sample. `length` counts tokens; `accuracy` is None where the reward returns no `acc`."""
    completion, result = sample.completion, sample.result
    return {
        "draw_index": group.draw_index,
        "sample_index": completion.sample_index,
        "data_source": group.prompt.data_source,
        "prompt": group.prompt.text,
        "response": decode(completion.token_ids),
        "ground_truth": group.prompt.ground_truth,
        "prediction": result.pred,
        "status": result.status,
        "detail": result.detail,
        "score": result.score,
        "accuracy": result.metrics.get("acc"),
        "overlong_penalty": sample.overlong_penalty,
        "reward": sample.reward,
        "length": sample.length,
        "finish_reason": completion.finish_reason,
        "repetition": ngram_repetition(completion.token_ids),
        "weight_version": completion.weight_version,
    }
