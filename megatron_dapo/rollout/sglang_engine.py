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
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from megatron_dapo.config.tree import RolloutConfig
from megatron_dapo.progress import PROGRESS
from megatron_dapo.rollout.engine import ALL_TAGS, Tag
from megatron_dapo.rollout.exchange import Arrival, Exchange, RefusedError
from megatron_dapo.rollout.failures import EngineFailedError, EngineHangsError, WeightsNotLoadedError
from megatron_dapo.rollout.request_check import RequestCheck
from megatron_dapo.rollout.server_process import HOST, ServerProcess, ServerSpec, child_environment
from megatron_dapo.rollout.sglang_checksums import LOADER, pack_order
from megatron_dapo.rollout.weight_buckets import ModelWeights, SharedBuckets, pickled
from megatron_dapo.types import Completion, FinishReason, Request

SHIMS = Path(__file__).parent / "sglang_cpu_shims"
POLL_SECONDS = 0.05  # that `poll` waits for a first completion
CALL_SECONDS = 600.0  # that a call other than a generation may take
IDLE_SECONDS = 60.0  # for the server to become idle after an abort
KV_TOKENS_ON_CPU = 262_144  # of all sequences together
# A bound alone: the cache has KV_TOKENS_ON_CPU. A low one fails where other processes take memory as the server starts.
HOST_MEMORY_FRACTION = 0.9
FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}

Key = tuple[int, int, int]  # (submissions dropped before it, draw index, sample index)


class SGLangEngine:
    """A `RolloutEngine`. Making it starts the server.

    A server that died or hangs is an EngineFailedError from the call that saw it; then only `restart` and `close` help.
    """

    def __init__(
        self,
        model_path: str | Path,
        eos_token_ids: Sequence[int],
        config: RolloutConfig,
        *,
        dtype: torch.dtype,
        cuda_device: int | None,
        log: Path,
        quiet_limit: float = 60.0,
    ):
        """
        Args:
            dtype: of weights and log-probs' logits.
            cuda_device: the first that it may use; None: the CPU.
            log: a file for what the server prints.
            quiet_limit: seconds without a completion after which the server is asked whether it is well.

        Raises:
            ValueError: settings that the server cannot run with on this device.
            EngineFailedError, PortInUseError: it did not start.
        """
        self._check = RequestCheck(AutoConfig.from_pretrained(model_path), eos_token_ids)
        self._eos = sorted(eos_token_ids)
        self._weights = ModelWeights(model_path)
        self._buckets = SharedBuckets(self._weights, dtype, config.weight_sync.bucket_bytes)
        self._tp_size = config.tensor_model_parallel_size
        key = secrets.token_hex(16)  # a server of another run, on a port that was ours, refuses us
        flags = server_flags(model_path, config, dtype, cuda_device)

        def command(port: int) -> list[str]:
            own = ["--host", HOST, "--port", str(port), "--api-key", key]
            return [sys.executable, "-m", "sglang.launch_server", *flags, *own]

        on_cpu = {"SGLANG_USE_CPU_ENGINE": "1"} if cuda_device is None else {}
        self._server = ServerProcess(
            ServerSpec(
                name="SGLang",
                command=command,
                environment=child_environment(on_cpu, (SHIMS,) if cuda_device is None else ()),
                log=log,
                health_path="/health_generate",
                headers={"Authorization": f"Bearer {key}"},
                answer_limit=quiet_limit,
            )
        )
        self._exchange: Exchange[Key] = Exchange(self._server, config.max_num_seqs)
        self._quiet_limit = quiet_limit
        self._dropped = 0  # how often pending requests were dropped: what arrives of those is not ours
        self._forget()
        self._server.start()

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned by `poll`."""
        return len(self._pending)

    @property
    def server(self) -> ServerProcess:
        return self._server

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all of them or, where one is refused, none.

        Raises:
            WeightsNotLoadedError: no weights were loaded, or the last load failed, or they sleep.
            ValueError: see `RequestCheck`; or a (draw_index, sample_index) that is pending.
        """
        if self._version is None:
            raise WeightsNotLoadedError("no weights to generate with: call load_weights with the whole model first")
        if self._asleep:
            raise RuntimeError(f"{', '.join(sorted(self._asleep))} of the engine sleep; wake them before requests")
        self._check.all(requests, self._pending)
        self._server.check()
        self._last_arrival = time.monotonic()
        for request in requests:
            name = (request.draw_index, request.sample_index)
            self._pending.add(name)
            self._exchange.send((self._dropped, *name), "/generate", self._body(request))

    def poll(self) -> list[Completion]:
        """Completions that arrived; waits a moment for a first one.

        Raises:
            EngineFailedError: the server died or hangs. All pending requests are given up; the caller knows them.
            RefusedError: the server refused a request.
        """
        found = [a for a in self._exchange.arrived(POLL_SECONDS) if a.key[0] == self._dropped]
        for arrival in found:
            if isinstance(arrival.answer, RefusedError):
                raise arrival.answer
            if isinstance(arrival.answer, Exception):
                self._fail(self._server.failure(arrival.answer))
        if found:
            self._last_arrival = time.monotonic()
        elif self._pending and not self._paused and time.monotonic() - self._last_arrival > self._quiet_limit:
            try:
                self._server.check_health()
            except EngineFailedError as error:
                self._fail(error)
            self._last_arrival = time.monotonic()
        completions = [_completion(arrival) for arrival in found]
        self._pending -= {(c.draw_index, c.sample_index) for c in completions}
        return completions

    def abort(self) -> None:
        """Drop all pending requests and what they had written; the server is idle afterwards."""
        self._exchange.drop_unsent()
        self._dropped += 1
        self._pending.clear()
        deadline = time.monotonic() + IDLE_SECONDS
        while self._exchange.in_flight:
            self._call("/abort_request", {"rid": "", "abort_all": True})
            self._exchange.arrived(POLL_SECONDS)
            if time.monotonic() > deadline:
                self._fail(EngineHangsError(f"requests go on after an abort.{self._server.log_tail()}"))

    def pause(self) -> None:
        """Stop decoding. Requests under way give their cache back and compute it again after `resume`."""
        self._call("/pause_generation", {"mode": "retract"})
        self._paused = True

    def resume(self) -> None:
        self._call("/continue_generation", {})
        self._paused, self._last_arrival = False, time.monotonic()

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Bucket by bucket into the running server, and its prefix cache emptied. After an error the engine generates
        nothing until a load succeeds.

        Raises:
            RuntimeError: requests are pending (a response is written by one set of weights), or the weights sleep.
            ValueError: see `ModelWeights.checked`.
            RefusedError, EngineFailedError: the server refused the weights, died or hangs.
        """
        self._refuse_pending(f"load_weights(version={version})")
        if "weights" in self._asleep:
            raise RuntimeError(f"load_weights(version={version}) while weights sleep: wake them first")
        self._version = None
        self._wait_until_idle()
        self._call("/begin_weight_update", {})
        try:
            for bucket in self._buckets.pack(self._weights.checked(tensors, version)):
                payload = base64.b64encode(bucket).decode()
                body = {"serialized_named_tensors": [payload] * self._tp_size, "flush_cache": False}
                self._call("/update_weights_from_tensor", body)
        except (ValueError, RefusedError):
            self._call("/end_weight_update", {})
            raise
        self._call("/end_weight_update", {})
        self._call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        self._wait_until_idle()  # which empties the prefix cache
        self._version = version

    def weight_checksums(self) -> dict[str, int]:
        """Hugging Face name -> `algo.checksum.checksum` of the tensor as the server holds it. Computed there.

        Raises:
            NotImplementedError: the engine spans several GPUs.
            RuntimeError: requests are pending.
        """
        if self._tp_size > 1:
            raise NotImplementedError(
                f"checksums of an engine over {self._tp_size} GPUs: each holds a slice, and SGLang's slices are not "
                "told apart here; verify with tensor_model_parallel_size=1, or by the probe alone"
            )
        self._refuse_pending("weight_checksums")
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "checksums.json"
            order = base64.b64encode(pickled(pack_order(answer, self._weights.shapes))).decode()
            self._call("/begin_weight_update", {})
            body = {"serialized_named_tensors": [order], "load_format": LOADER, "flush_cache": False}
            try:
                self._call("/update_weights_from_tensor", body)
            finally:
                self._call("/end_weight_update", {})
            return {name: int(found) for name, found in json.loads(answer.read_text()).items()}

    def sleep(self, tags: Sequence[Tag]) -> None:
        """Raises RuntimeError: requests are pending."""
        self._refuse_pending("sleep")
        wanted: list[Tag] = [tag for tag in ALL_TAGS if tag in tags and tag not in self._asleep]
        if wanted:
            self._wait_until_idle()
            self._call("/release_memory_occupation", {"tags": wanted})
            self._asleep.update(wanted)
            if "weights" in wanted:
                self._version = None

    def wake(self, tags: Sequence[Tag]) -> None:
        wanted: list[Tag] = [tag for tag in ALL_TAGS if tag in tags and tag in self._asleep]
        if wanted:
            self._call("/resume_memory_occupation", {"tags": wanted})
            self._asleep.difference_update(wanted)

    def restart(self) -> None:
        """Kill what is left of the server and start another. Errors as for making the engine."""
        self._exchange.drop_unsent()
        self._dropped += 1
        self._forget()
        self._server.restart()

    def close(self) -> None:
        self._server.stop()

    def _body(self, request: Request) -> dict[str, Any]:
        params = request.params
        return {
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

    def _call(self, path: str, body: Any) -> Any:
        try:
            with PROGRESS.patient(f"the server works on {path}"):  # it has a time limit of its own
                return self._exchange.call(path, body, CALL_SECONDS)
        except EngineFailedError as error:
            self._fail(error)

    def _fail(self, error: EngineFailedError) -> None:
        """Nothing of it is left running, so that no thread waits for it."""
        self._server.kill()
        self._exchange.drop_unsent()
        self._dropped += 1
        self._forget()
        raise error

    def _forget(self) -> None:
        self._version: int | None = None  # None: there are no weights to generate with
        self._pending: set[tuple[int, int]] = set()
        self._asleep: set[Tag] = set()
        self._paused = False
        self._last_arrival = time.monotonic()

    def _wait_until_idle(self) -> None:
        """The server empties its cache once it has nothing to do, shortly after its last answer."""
        self._call(f"/flush_cache?timeout={IDLE_SECONDS:g}", {})

    def _refuse_pending(self, what: str) -> None:
        if self._pending:
            raise RuntimeError(f"{what} while {self.pending} requests are pending: poll until none is, or abort them")


def server_flags(
    model_path: str | Path, config: RolloutConfig, dtype: torch.dtype, cuda_device: int | None
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
    if cuda_device is None:
        for name, value, off in (
            ("tensor_model_parallel_size", config.tensor_model_parallel_size, 1),
            ("deterministic", config.deterministic, False),
        ):
            if value != off:
                raise ValueError(
                    f"actor_rollout_ref.rollout.{name} is {value}, and SGLang runs on the CPU, where it has no such "
                    f"mode; use {off}, or a GPU"
                )
        flags |= {
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--mem-fraction-static": HOST_MEMORY_FRACTION,
        }
        flags |= {"--max-total-tokens": KV_TOKENS_ON_CPU}
        switches.append("--disable-overlap-schedule")
    else:
        flags |= {"--tp-size": config.tensor_model_parallel_size, "--base-gpu-id": cuda_device}
        flags |= {"--mem-fraction-static": config.gpu_memory_utilization}
        switches.append("--enable-memory-saver")  # without it `sleep` frees nothing
        switches += ["--disable-cuda-graph"] if config.enforce_eager else []
        switches += ["--enable-deterministic-inference"] if config.deterministic else []
    return [str(part) for flag in flags.items() for part in flag] + switches


def _completion(arrival: Arrival[Key]) -> Completion:
    _, draw_index, sample_index = arrival.key
    meta, token_ids = arrival.answer["meta_info"], arrival.answer["output_ids"]
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    if len(logprobs) != len(token_ids):
        raise RuntimeError(
            f"SGLang answered draw {draw_index}, sample {sample_index} with {len(token_ids)} tokens and "
            f"{len(logprobs)} log-probs; a version that this engine was not written for?"
        )
    return Completion(
        draw_index=draw_index,
        sample_index=sample_index,
        token_ids=np.array(token_ids, np.int64),
        logprobs=np.array(logprobs, np.float32),
        finish_reason=FINISH[meta["finish_reason"]["type"]],
        weight_version=int(meta["weight_version"]),
    )
