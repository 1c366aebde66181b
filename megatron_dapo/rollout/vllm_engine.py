"""vLLM's own server as a rollout engine: a child process on this host, asked over HTTP.

Its weights are never read from the checkpoint: they come through `load_weights`, by way of memory that both processes
map, and `vllm_extension.py` in vLLM's worker. Written against vLLM 0.32.

Log-probs are those of the distribution drawn from: of the softmax at the request's temperature, renormalised over
top-k and top-p; at temperature 1 for a greedy request. What a request draws depends on its own seed; how far its
log-probs depend on what else is decoded, on the kernels (`deterministic`, CUDA only).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from megatron_dapo.config.tree import RolloutConfig
from megatron_dapo.rollout.engine import ALL_TAGS, Tag
from megatron_dapo.rollout.failures import EngineHangsError
from megatron_dapo.rollout.held_tensors import whole_checksums
from megatron_dapo.rollout.http_engine import (
    IDLE_SECONDS,
    POLL_SECONDS,
    HttpEngine,
    ServerPlan,
    command_line,
    new_key,
    refuse_on_cpu,
    visible,
)
from megatron_dapo.rollout.vllm_extension import EXTENSION
from megatron_dapo.rollout.vllm_key import KEY_VARIABLE, MIDDLEWARE
from megatron_dapo.types import Completion, FinishReason, Request

KV_BYTES_ON_CPU = 1 << 30  # taken as they are needed
BLOCK_TOKENS_ON_CPU = 32  # of the prefix cache; vLLM's 128 are more than a short prompt has
HEAD_SIZES_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # with another its first request ends it
FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class VLLMEngine(HttpEngine):
    @staticmethod
    def _server_plan(
        model_path: str | Path, config: RolloutConfig, dtype: torch.dtype, devices: Sequence[str] | None
    ) -> ServerPlan:
        key = new_key()
        return ServerPlan(
            name="vLLM",
            module="vllm.entrypoints.openai.api_server",
            flags=server_flags(model_path, config, dtype, devices),
            key=key,
            key_flags=(),
            environment={KEY_VARIABLE: key} | server_environment(config, devices),
            search_path=(),
            health_path="/weight_info",  # asks the engine's process; /health does not
        )

    def _generation(self, request: Request) -> tuple[str, Mapping[str, Any]]:
        params = request.params
        return "/inference/v1/generate", {
            "token_ids": np.asarray(request.prompt_ids).tolist(),
            "sampling_params": {
                "max_tokens": params.max_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "seed": request.seed,
                "stop_token_ids": self._eos,
                "ignore_eos": True,  # vLLM's idea of it; ours is in stop_token_ids
                "logprobs": 0,  # of the token drawn alone
            },
        }

    def _completion(self, draw_index: int, sample_index: int, answer: Any) -> Completion:
        (choice,) = answer["choices"]
        token_ids = choice["token_ids"]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        self._refuse_unequal(draw_index, sample_index, token_ids, logprobs)
        versions = {span["version"] for span in choice["weight_versions"]}
        if len(versions) != 1:
            raise RuntimeError(f"draw {draw_index}, sample {sample_index} was written by weights {sorted(versions)}")
        return Completion(
            draw_index=draw_index,
            sample_index=sample_index,
            token_ids=np.array(token_ids, np.int64),
            logprobs=np.array(logprobs, np.float32),
            finish_reason=FINISH[choice["finish_reason"]],
            weight_version=int(versions.pop()),
        )

    def _abort_all(self) -> None:
        self._call("/abort_requests", {})

    def _pause(self) -> None:
        self._call("/pause?mode=keep", {})

    def _resume(self) -> None:
        self._call("/resume", {})

    def _begin_update(self) -> None:
        self._in_workers("begin_policy_update")

    def _take_bucket(self, pickles: Sequence[str]) -> None:
        self._in_workers("take_policy_bucket", [*pickles])

    def _end_update(self) -> None:
        self._in_workers("end_policy_update")

    def _name_version(self, version: str) -> None:
        self._call("/update_weight_version", {"new_version": version})

    def _empty_cache(self) -> None:
        deadline = time.monotonic() + IDLE_SECONDS
        while not self._call("/reset_prefix_cache", {})["success"]:
            if time.monotonic() > deadline:
                self._fail(EngineHangsError(f"the prefix cache cannot be emptied.{self._server.log_tail()}"))
            time.sleep(POLL_SECONDS)

    def _held_checksums(self) -> dict[str, int]:
        shapes = {name: list(shape) for name, shape in self._weights.shapes.items()}
        of_workers = self._in_workers("policy_checksums", shapes, self._tp_size, self._weights.head_dim)["results"]
        return whole_checksums({name: int(part) for name, part in found.items()} for found in of_workers)

    def _sleep(self, tags: Sequence[Tag]) -> None:
        """vLLM puts all to sleep, keeping the weights on the host (level 1) or not (2), and wakes by tag."""
        sleeping = self._asleep.union(tags)
        if self._asleep:
            self._call("/wake_up", {})
        self._call(f"/sleep?level={2 if 'weights' in sleeping else 1}", {})
        for tag in ALL_TAGS:
            if tag not in sleeping:
                self._wake([tag])

    def _wake(self, tags: Sequence[Tag]) -> None:
        self._call("/wake_up?" + "&".join(f"tags={tag}" for tag in tags), {})

    def _in_workers(self, method: str, *args: Any) -> Any:
        return self._call("/collective_rpc", {"method": method, "args": [*args]})


def server_environment(config: RolloutConfig, devices: Sequence[str] | None) -> dict[str, str]:
    """What vLLM takes no flag for."""
    variables = {
        "VLLM_SERVER_DEV_MODE": "1",  # the paths for weights, pauses and sleep
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if devices is None:
        # As many threads as this process's own, on any core: several engines of a host would be bound to the same ones.
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    else:
        variables |= visible(devices)
        variables |= {"VLLM_BATCH_INVARIANT": "1"} if config.deterministic else {}
    return variables


def server_flags(
    model_path: str | Path, config: RolloutConfig, dtype: torch.dtype, devices: Sequence[str] | None
) -> list[str]:
    """The server's command line but for its address.

    Raises:
        ValueError: settings that need CUDA.
    """
    flags: dict[str, object] = {
        "--model": model_path,
        "--dtype": str(dtype).removeprefix("torch."),
        "--load-format": "dummy",  # the weights come from the policy
        "--worker-extension-cls": EXTENSION,
        "--middleware": MIDDLEWARE,
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",  # not the checkpoint's defaults: requests say all
        "--max-model-len": "auto",  # the model's, or what the cache has room for: a longer request is refused then
        "--max-num-seqs": config.max_num_seqs,
        "--max-num-batched-tokens": config.max_num_batched_tokens,
    }
    switches = ["--tokens-only", "--skip-tokenizer-init", "--disable-uvicorn-access-log", "--disable-log-stats"]
    switches.append("--enable-chunked-prefill" if config.enable_chunked_prefill else "--no-enable-chunked-prefill")
    if devices is None:
        refuse_on_cpu("vLLM", config)
        refuse_head_size(model_path)
        flags |= {"--kv-cache-memory-bytes": KV_BYTES_ON_CPU, "--block-size": BLOCK_TOKENS_ON_CPU}
        switches.append("--enforce-eager")  # without it torch's compiler wants minutes and a C++ compiler
    else:
        flags |= {
            "--tensor-parallel-size": config.tensor_model_parallel_size,
            "--gpu-memory-utilization": config.gpu_memory_utilization,
        }
        switches.append("--enable-sleep-mode")  # without it `sleep` frees nothing
        switches += ["--enforce-eager"] if config.enforce_eager else []
    return command_line(flags, switches)


def refuse_head_size(model_path: str | Path) -> None:
    """Raises ValueError: vLLM has no attention on the CPU for heads of that size."""
    config = AutoConfig.from_pretrained(model_path)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size not in HEAD_SIZES_ON_CPU:
        raise ValueError(
            f"{model_path} has attention heads of size {size}, and vLLM on the CPU knows {HEAD_SIZES_ON_CPU} alone; "
            "use another actor_rollout_ref.rollout.name (torch, sglang), or a GPU"
        )
