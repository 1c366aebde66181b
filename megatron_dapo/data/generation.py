"""One generation batch: every prompt drawn gets n responses, every response a score as soon as it is finished.

The engine goes on writing while finished responses are scored. What comes back is in draw order and holds the same
bits whatever finished first. Which groups are kept is decided in `dynamic_sampling.py`.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from megatron_dapo.types import Completion, IntArray, Prompt, Request, RewardResult, Sample, SamplingParams

Key = tuple[int, int]  # (draw index, sample index)
Task = TypeVar("Task")
TaskIn = TypeVar("TaskIn", contravariant=True)
Failure = Literal["timeout", "error", "abort"]

MAX_TRIES = 3  # of one response that the engine gives up
POLL_THAT_WORKED = 2e-4  # seconds; an embedded engine works inside poll, one elsewhere answers faster than this
FIRST_PAUSE, LONGEST_PAUSE = 1e-3, 2e-2  # seconds after an engine poll that did nothing, doubling
SCORER_WAIT = 1.0  # seconds to wait at a time for scores, once the engine has nothing left


class Engine(Protocol):
    """The part of a rollout engine that is used here."""

    def submit(self, requests: Sequence[Request]) -> None: ...
    def poll(self) -> list[Completion]: ...
    @property
    def pending(self) -> int: ...
    def abort(self) -> None: ...


class Scorer(Protocol[TaskIn]):
    """Scores responses elsewhere. `poll` waits at most `wait` seconds for a first result."""

    def submit(self, key: Key, task: TaskIn) -> None: ...
    def poll(self, wait: float) -> list[tuple[Key, RewardResult]]: ...
    @property
    def pending(self) -> int: ...


@dataclass(frozen=True)
class Draw:
    """A prompt that was drawn. `again`: because its first group was short."""

    draw_index: int
    prompt: Prompt
    again: bool = False


@dataclass(frozen=True)
class ClosedDraw:
    """A draw of which every response is scored or given up."""

    draw: Draw
    samples: tuple[Sample, ...]  # those with a score, by sample index
    failures: tuple[Failure, ...]  # one for each of the others
    retries: int  # aborted responses that were submitted again


def response_seed(run_seed: int, draw_index: int, sample_index: int) -> int:
    """The seed of one response: the first 63 bits of BLAKE2b over the three numbers in decimal."""
    digest = hashlib.blake2b(f"{run_seed} {draw_index} {sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class GroupRollout(Generic[Task]):
    """What turns draws into scored responses."""

    engine: Engine
    scorer: Scorer[Task]
    make_task: Callable[[Prompt, str], Task]  # (prompt, response text)
    decode: Callable[[IntArray], str]
    overlong_penalty: Callable[[int], float]  # of a response's tokens
    params: SamplingParams
    n: int  # responses a prompt
    seed: int

    def run(self, draws: Sequence[Draw]) -> list[ClosedDraw]:
        """Close every draw, in the order given.

        All requests go to the engine in one call. A response that it gives up is submitted again with its own seed,
        MAX_TRIES times in all. If anything is raised, Ctrl-C included, the engine's requests are dropped.

        Raises:
            RuntimeError: engine or scorer returned something that is not awaited, or lost something that is.
        """
        batch = _OpenBatch({key: draw for draw in draws for key in self._keys(draw)})
        try:
            self._submit(batch, batch.draws)
            pause = FIRST_PAUSE
            while batch.awaits:
                pause = FIRST_PAUSE if self._advance(batch, pause) else min(2 * pause, LONGEST_PAUSE)
        except BaseException:
            self.engine.abort()
            raise
        return [batch.close(draw, self._keys(draw)) for draw in draws]

    def _advance(self, batch: _OpenBatch, pause: float) -> bool:
        """Take what is finished and pass it on; whether anything was done. If not, it took `pause` seconds or more."""
        started = time.perf_counter()
        completions = self.engine.poll() if self.engine.pending else []
        worked = bool(completions) or time.perf_counter() - started > POLL_THAT_WORKED
        self._take_completions(batch, completions)
        if not self.engine.pending and not self.scorer.pending and batch.awaits:
            raise RuntimeError(
                f"{len(batch.writing)} responses are lost in the engine and {len(batch.scoring)} in the scorer, which "
                f"say that nothing is pending; the first (draw, sample) is {min(batch.writing | batch.scoring.keys())}"
            )
        wait = 0.0 if worked else pause
        if self.scorer.pending:
            results = self.scorer.poll(wait if self.engine.pending else SCORER_WAIT)
            self._take_results(batch, results)
            return worked or bool(results)
        time.sleep(wait)
        return worked

    def _take_completions(self, batch: _OpenBatch, completions: Iterable[Completion]) -> None:
        again: list[Key] = []
        for completion in completions:
            key = (completion.draw_index, completion.sample_index)
            if key not in batch.writing:
                raise RuntimeError(f"the engine returned response (draw, sample) = {key}, which is not awaited from it")
            batch.writing.remove(key)
            if completion.finish_reason != "abort":
                batch.scoring[key] = completion
                text = self.decode(completion.token_ids)
                self.scorer.submit(key, self.make_task(batch.draws[key].prompt, text))
            elif batch.retries[key] + 1 < MAX_TRIES:
                batch.retries[key] += 1
                again.append(key)
            else:
                batch.failures[key] = "abort"
        if again:
            self._submit(batch, sorted(again))

    def _take_results(self, batch: _OpenBatch, results: Iterable[tuple[Key, RewardResult]]) -> None:
        for key, result in results:
            if key not in batch.scoring:
                raise RuntimeError(f"the scorer returned response (draw, sample) = {key}, which is not awaited from it")
            completion = batch.scoring.pop(key)
            if result.status == "timeout" or result.status == "error":
                batch.failures[key] = result.status
            else:
                penalty = self.overlong_penalty(len(completion.token_ids))
                batch.samples[key] = Sample(completion, result, penalty, result.score + penalty)

    def _submit(self, batch: _OpenBatch, keys: Iterable[Key]) -> None:
        requests = [
            Request(
                draw_index=draw_index,
                sample_index=sample_index,
                prompt_ids=batch.draws[draw_index, sample_index].prompt.token_ids,
                seed=response_seed(self.seed, draw_index, sample_index),
                params=self.params,
            )
            for draw_index, sample_index in keys
        ]
        batch.writing.update((request.draw_index, request.sample_index) for request in requests)
        self.engine.submit(requests)

    def _keys(self, draw: Draw) -> list[Key]:
        return [(draw.draw_index, sample_index) for sample_index in range(self.n)]


@dataclass
class _OpenBatch:
    """Where each response of a generation batch stands."""

    draws: dict[Key, Draw]
    writing: set[Key] = field(default_factory=set)
    scoring: dict[Key, Completion] = field(default_factory=dict)
    samples: dict[Key, Sample] = field(default_factory=dict)
    failures: dict[Key, Failure] = field(default_factory=dict)
    retries: Counter[Key] = field(default_factory=Counter)

    @property
    def awaits(self) -> bool:
        return bool(self.writing or self.scoring)

    def close(self, draw: Draw, keys: Sequence[Key]) -> ClosedDraw:
        return ClosedDraw(
            draw=draw,
            samples=tuple(self.samples[key] for key in keys if key in self.samples),
            failures=tuple(self.failures[key] for key in keys if key in self.failures),
            retries=sum(self.retries[key] for key in keys),
        )
