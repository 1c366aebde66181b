"""Groups as plain numbers, text and arrays, for a checkpoint, and back.

The prompt is not written out but named by its position: a state is only taken up with the dataset it was saved with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_dapo.types import Completion, Group, Prompt, RewardResult, Sample


def group_state(group: Group) -> dict[str, Any]:
    return {
        "draw_index": group.draw_index,
        "prompt": group.prompt.index,
        "weight_version": group.weight_version,
        "samples": [_sample_state(sample) for sample in group.samples],
    }


def group_from_state(state: Mapping[str, Any], prompts: Sequence[Prompt]) -> Group:
    return Group(
        draw_index=state["draw_index"],
        prompt=prompts[state["prompt"]],
        samples=tuple(_sample_from_state(sample, state["draw_index"]) for sample in state["samples"]),
        weight_version=state["weight_version"],
    )


def _sample_state(sample: Sample) -> dict[str, Any]:
    completion, result = sample.completion, sample.result
    return {
        "sample_index": completion.sample_index,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
        "weight_version": completion.weight_version,
        "status": result.status,
        "score": result.score,
        "metrics": dict(result.metrics),
        "pred": result.pred,
        "detail": result.detail,
        "overlong_penalty": sample.overlong_penalty,
        "reward": sample.reward,
    }


def _sample_from_state(state: Mapping[str, Any], draw_index: int) -> Sample:
    return Sample(
        completion=Completion(
            draw_index=draw_index,
            sample_index=state["sample_index"],
            token_ids=np.asarray(state["token_ids"], np.int64),
            logprobs=np.asarray(state["logprobs"], np.float32),
            finish_reason=state["finish_reason"],
            weight_version=state["weight_version"],
        ),
        result=RewardResult(state["status"], state["score"], state["metrics"], state["pred"], state["detail"]),
        overlong_penalty=state["overlong_penalty"],
        reward=state["reward"],
    )
