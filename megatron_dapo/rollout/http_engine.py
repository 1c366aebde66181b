"""What engines share whose server is a child process on this host, asked over HTTP: the bookkeeping.

Which requests are pending, what sleeps, which weights are in, and whether a server that says nothing is well. An
engine adds its words: how its server is started, what is sent to which path, and what an answer means.
"""

from __future__ import annotations

import base64
import secrets
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AutoConfig

from megatron_dapo.config.tree import RolloutConfig
from megatron_dapo.progress import PROGRESS
from megatron_dapo.rollout.engine import ALL_TAGS, Tag
from megatron_dapo.rollout.exchange import Exchange, RefusedError
from megatron_dapo.rollout.failures import EngineFailedError, EngineHangsError, WeightsNotLoadedError
from megatron_dapo.rollout.request_check import RequestCheck
from megatron_dapo.rollout.server_process import HOST, ServerProcess, ServerSpec, child_environment
from megatron_dapo.rollout.weight_buckets import ModelWeights, SharedBuckets
from megatron_dapo.types import Completion, Request

POLL_SECONDS = 0.05  # that `poll` waits for a first completion
CALL_SECONDS = 600.0  # that a call other than a generation may take
IDLE_SECONDS = 60.0  # for the server to become idle after an abort

Key = tuple[int, int, int]  # (submissions dropped before it, draw index, sample index)


@dataclass(frozen=True)
class ServerPlan:
    """How an engine's server is started. `new_key` makes the key that it has to be asked with."""

    name: str  # in errors
    module: str  # run by this interpreter
    flags: Sequence[str]  # but for address and key
    key: str
    key_flags: Sequence[str]
    environment: Mapping[str, str]  # beside this process's own
    search_path: Sequence[Path]  # before this process's PYTHONPATH
    health_path: str  # answers 200 when the server can work


def new_key() -> str:
    """A server of another run, on a port that was ours, refuses us for it."""
    return secrets.token_hex(16)


class HttpEngine(ABC):
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
        devices: Sequence[str] | None,
        log: Path,
        quiet_limit: float = 60.0,
    ):
        """
        Args:
            dtype: of weights and log-probs' logits.
            devices: those that it takes, as CUDA_VISIBLE_DEVICES names them; None: the CPU.
            log: a file for what the server prints.
            quiet_limit: seconds without a completion after which the server is asked whether it is well.

        Raises:
            ValueError: settings that the server does not have on this device.
            EngineFailedError, PortInUseError: it did not start.
        """
        plan = self._server_plan(model_path, config, dtype, devices)
        self._check = RequestCheck(AutoConfig.from_pretrained(model_path), eos_token_ids)
        self._eos = sorted(eos_token_ids)
        self._weights = ModelWeights(model_path)
        self._tp_size = config.tensor_model_parallel_size
        self._buckets = SharedBuckets(self._weights, dtype, config.weight_sync.bucket_bytes, self._tp_size)
        self._name = plan.name

        def command(port: int) -> list[str]:
            own = ["--host", HOST, "--port", str(port), *plan.key_flags]
            return [sys.executable, "-m", plan.module, *plan.flags, *own]

        self._server = ServerProcess(
            ServerSpec(
                name=plan.name,
                command=command,
                environment=child_environment(plan.environment, plan.search_path),
                log=log,
                health_path=plan.health_path,
                headers={"Authorization": f"Bearer {plan.key}"},
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
            path, body = self._generation(request)
            self._exchange.send((self._dropped, *name), path, body)

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
        completions = [self._completion(*arrival.key[1:], arrival.answer) for arrival in found]
        self._pending -= {(c.draw_index, c.sample_index) for c in completions}
        return completions

    def abort(self) -> None:
        """Drop all pending requests and what they had written; the server is idle afterwards."""
        self._exchange.drop_unsent()
        self._dropped += 1
        self._pending.clear()
        deadline = time.monotonic() + IDLE_SECONDS
        while self._exchange.in_flight:
            self._abort_all()
            self._exchange.arrived(POLL_SECONDS)
            if time.monotonic() > deadline:
                self._fail(EngineHangsError(f"requests go on after an abort.{self._server.log_tail()}"))

    def pause(self) -> None:
        """Stop decoding. Requests under way stay, and go on after `resume`."""
        self._pause()
        self._paused = True

    def resume(self) -> None:
        self._resume()
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
        self._empty_cache()  # and idle by then
        self._begin_update()
        try:
            for bucket in self._buckets.pack(self._weights.checked(tensors, version)):
                self._take_bucket([base64.b64encode(pickle).decode() for pickle in bucket])
        except (ValueError, RefusedError):
            self._end_update()
            raise
        self._end_update()
        self._name_version(str(version))
        self._empty_cache()
        self._version = version

    def weight_checksums(self) -> dict[str, int]:
        """Hugging Face name -> `algo.checksum.checksum` of the tensor as the server holds it. Computed there.

        Raises:
            RuntimeError: requests are pending.
        """
        self._refuse_pending("weight_checksums")
        return self._held_checksums()

    def sleep(self, tags: Sequence[Tag]) -> None:
        """Raises RuntimeError: requests are pending."""
        self._refuse_pending("sleep")
        wanted: list[Tag] = [tag for tag in ALL_TAGS if tag in tags and tag not in self._asleep]
        if wanted:
            self._empty_cache()
            self._sleep(wanted)
            self._asleep.update(wanted)
            if "weights" in wanted:
                self._version = None

    def wake(self, tags: Sequence[Tag]) -> None:
        wanted: list[Tag] = [tag for tag in ALL_TAGS if tag in tags and tag in self._asleep]
        if wanted:
            self._wake(wanted)
            self._asleep.difference_update(wanted)

    def restart(self) -> None:
        """Kill what is left of the server and start another. Errors as for making the engine."""
        self._exchange.drop_unsent()
        self._dropped += 1
        self._forget()
        self._server.restart()

    def close(self) -> None:
        self._server.stop()

    @staticmethod
    @abstractmethod
    def _server_plan(
        model_path: str | Path, config: RolloutConfig, dtype: torch.dtype, devices: Sequence[str] | None
    ) -> ServerPlan:
        """Raises ValueError: settings that the server does not have on this device."""

    @abstractmethod
    def _generation(self, request: Request) -> tuple[str, Mapping[str, Any]]:
        """Path and body of a request for one completion."""

    @abstractmethod
    def _completion(self, draw_index: int, sample_index: int, answer: Any) -> Completion:
        """Raises RuntimeError: the answer is not of the form that this engine was written for."""

    @abstractmethod
    def _abort_all(self) -> None:
        """All that the server has of ours ends, and is answered, soon."""

    @abstractmethod
    def _pause(self) -> None: ...

    @abstractmethod
    def _resume(self) -> None: ...

    @abstractmethod
    def _begin_update(self) -> None: ...

    @abstractmethod
    def _take_bucket(self, pickles: Sequence[str]) -> None:
        """Of `SharedBuckets` in base64; the server has no use for the memory any more when this returns."""

    @abstractmethod
    def _end_update(self) -> None:
        """Also of an update that failed."""

    @abstractmethod
    def _name_version(self, version: str) -> None:
        """Of the weights, which the server's answers then carry."""

    @abstractmethod
    def _empty_cache(self) -> None:
        """Of prefixes, which are of old weights after an update. The server has to be idle, and is soon after its last
        answer: wait for that."""

    @abstractmethod
    def _held_checksums(self) -> dict[str, int]: ...

    @abstractmethod
    def _sleep(self, tags: Sequence[Tag]) -> None:
        """`self._asleep` are those that sleep already."""

    @abstractmethod
    def _wake(self, tags: Sequence[Tag]) -> None: ...

    def _call(self, path: str, body: Any) -> Any:
        try:
            with PROGRESS.patient(f"the server works on {path}"):  # it has a time limit of its own
                return self._exchange.call(path, body, CALL_SECONDS)
        except EngineFailedError as error:
            self._fail(error)

    def _fail(self, error: EngineFailedError) -> NoReturn:
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

    def _refuse_unequal(
        self, draw_index: int, sample_index: int, tokens: Sequence[int], logprobs: Sequence[float]
    ) -> None:
        if len(logprobs) != len(tokens):
            raise RuntimeError(
                f"{self._name} answered draw {draw_index}, sample {sample_index} with {len(tokens)} tokens and "
                f"{len(logprobs)} log-probs; a version that this engine was not written for?"
            )

    def _refuse_pending(self, what: str) -> None:
        if self._pending:
            raise RuntimeError(f"{what} while {self.pending} requests are pending: poll until none is, or abort them")


def visible(devices: Sequence[str]) -> dict[str, str]:
    """What shows a server these CUDA devices and no others."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}


def refuse_on_cpu(engine: str, config: RolloutConfig) -> None:
    """Raises ValueError: settings that the engine's server has on CUDA alone."""
    for name, value, off in (
        ("tensor_model_parallel_size", config.tensor_model_parallel_size, 1),
        ("deterministic", config.deterministic, False),
    ):
        if value != off:
            raise ValueError(
                f"actor_rollout_ref.rollout.{name} is {value}, and {engine} runs on the CPU, where it has no such "
                f"mode; use {off}, or a GPU"
            )


def command_line(flags: Mapping[str, object], switches: Sequence[str]) -> list[str]:
    """Flags with a value, then those without."""
    return [str(part) for flag in flags.items() for part in flag] + [*switches]
