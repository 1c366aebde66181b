"""SGLang's own server as a rollout engine: a child process on this host, asked over HTTP.

Its weights are never read from the checkpoint: they come through `load_weights`, by way of memory that both processes
map, between SGLang's `begin_weight_update` and `end_weight_update`. Without CUDA it runs on torch's own operators
(`sglang_cpu_shims/`). Written against SGLang 0.5.23.

Log-probs are those of the softmax at the request's temperature (at 1 where it is 0, which is greedy). SGLang does not
renormalise them over top-k and top-p, which only evaluation uses. Which tokens are drawn depends on the seed of a
request where the server runs deterministically (`deterministic`, CUDA only); elsewhere on what else is decoded.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dapo.config.tree import RolloutConfig
from megatron_dapo.rollout.engine import Tag
from megatron_dapo.rollout.held_tensors import EngineRank, whole_checksums
from megatron_dapo.rollout.http_engine import (
    IDLE_SECONDS,
    HttpEngine,
    ServerPlan,
    command_line,
    new_key,
    refuse_on_cpu,
    visible,
)
from megatron_dapo.rollout.sglang_checksums import LOADER, pack_order
from megatron_dapo.rollout.weight_buckets import pickled
from megatron_dapo.types import Completion, FinishReason, Request

SHIMS = Path(__file__).parent / "sglang_cpu_shims"
KV_TOKENS_ON_CPU = 262_144  # of all sequences together
# A bound alone: the cache has KV_TOKENS_ON_CPU. A low one fails where other processes take memory as the server starts.
HOST_MEMORY_FRACTION = 0.9
FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class SGLangEngine(HttpEngine):
    @staticmethod
    def _server_plan(
        model_path: str | Path, config: RolloutConfig, dtype: torch.dtype, devices: Sequence[str] | None
    ) -> ServerPlan:
        key = new_key()
        return ServerPlan(
            name="SGLang",
            module="sglang.launch_server",
            flags=server_flags(model_path, config, dtype, devices),
            key=key,
            key_flags=["--api-key", key],
            environment={"SGLANG_USE_CPU_ENGINE": "1"} if devices is None else visible(devices),
            search_path=(SHIMS,) if devices is None else (),
            health_path="/health_generate",
        )

    def _generation(self, request: Request) -> tuple[str, Mapping[str, Any]]:
        params = request.params
        return "/generate", {
            "input_ids": np.asarray(request.prompt_ids).tolist(),
            "sampling_params": {
                "max_new_tokens": params.max_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "stop_token_ids": self._eos,
                "sampling_seed": request.seed,
                "no_stop_trim": True,
            },
            "return_logprob": True,
        }

    def _completion(self, draw_index: int, sample_index: int, answer: Any) -> Completion:
        meta, token_ids = answer["meta_info"], answer["output_ids"]
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        self._refuse_unequal(draw_index, sample_index, token_ids, logprobs)
        return Completion(
            draw_index=draw_index,
            sample_index=sample_index,
            token_ids=np.array(token_ids, np.int64),
            logprobs=np.array(logprobs, np.float32),
            finish_reason=FINISH[meta["finish_reason"]["type"]],
            weight_version=int(meta["weight_version"]),
        )

    def _abort_all(self) -> None:
        self._call("/abort_request", {"rid": "", "abort_all": True})

    def _pause(self) -> None:
        """Requests under way give their cache back and compute it again afterwards."""
        self._call("/pause_generation", {"mode": "retract"})

    def _resume(self) -> None:
        self._call("/continue_generation", {})

    def _begin_update(self) -> None:
        self._call("/begin_weight_update", {})

    def _take_bucket(self, pickles: Sequence[str]) -> None:
        self._call("/update_weights_from_tensor", {"serialized_named_tensors": [*pickles], "flush_cache": False})

    def _end_update(self) -> None:
        self._call("/end_weight_update", {})

    def _name_version(self, version: str) -> None:
        self._call("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def _empty_cache(self) -> None:
        self._call(f"/flush_cache?timeout={IDLE_SECONDS:g}", {})

    def _held_checksums(self) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as folder:
            ranks = [EngineRank(number, self._tp_size, self._weights.head_dim) for number in range(self._tp_size)]
            answers = {rank: Path(folder) / f"{rank.rank}.json" for rank in ranks}
            orders = [
                base64.b64encode(pickled(pack_order(answer, self._weights.shapes, rank))).decode()
                for rank, answer in answers.items()
            ]
            self._begin_update()
            body = {"serialized_named_tensors": orders, "load_format": LOADER, "flush_cache": False}
            try:
                self._call("/update_weights_from_tensor", body)
            finally:
                self._end_update()
            return whole_checksums(json.loads(answer.read_text()) for answer in answers.values())

    def _sleep(self, tags: Sequence[Tag]) -> None:
        self._call("/release_memory_occupation", {"tags": [*tags]})

    def _wake(self, tags: Sequence[Tag]) -> None:
        self._call("/resume_memory_occupation", {"tags": [*tags]})


def server_flags(
    model_path: str | Path, config: RolloutConfig, dtype: torch.dtype, devices: Sequence[str] | None
) -> list[str]:
    """The server's command line but for its address.

    Raises:
        ValueError: settings that need CUDA.
    """
    flags: dict[str, object] = {
        "--model-path": model_path,
        "--dtype": str(dtype).removeprefix("torch."),
        "--load-format": "dummy",  # the weights come from the policy
        "--custom-weight-loader": LOADER,
        "--max-running-requests": config.max_num_seqs,
        "--chunked-prefill-size": config.max_num_batched_tokens if config.enable_chunked_prefill else -1,
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
    }
    switches = ["--skip-tokenizer-init", "--skip-server-warmup"]
    if devices is None:
        refuse_on_cpu("SGLang", config)
        flags |= {
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--mem-fraction-static": HOST_MEMORY_FRACTION,
            "--max-total-tokens": KV_TOKENS_ON_CPU,
        }
        switches.append("--disable-overlap-schedule")
    else:
        flags |= {"--tp-size": config.tensor_model_parallel_size}
        flags |= {"--mem-fraction-static": config.gpu_memory_utilization}
        switches.append("--enable-memory-saver")  # without it `sleep` frees nothing
        switches += ["--disable-cuda-graph"] if config.enforce_eager else []
        switches += ["--enable-deterministic-inference"] if config.deterministic else []
    return command_line(flags, switches)
