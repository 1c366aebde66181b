"""One engine that decodes with continuous batching, from event to event: a sequence ends, or the cache is full.

Between two events all running sequences advance a token a step, and the time of a step is linear in what is cached, so
that the steps between are summed in closed form. Admission is in order; a sequence that no longer fits gives its place
back, the last admitted first, and computes what it had again when it returns. Left out: prefixes that sequences share,
prefills that overlap decoding.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

# Steps that all sequences must have room for when one is admitted, or it would be sent away again at once.
HEADROOM = 64
_ROUNDING = 1e-6  # of a step


@dataclass(frozen=True)
class EngineModel:
    """Seconds of a decode step: step_s + max(weights_s, sequence_s x sequences) + token_s x tokens cached."""

    step_s: float
    weights_s: float  # the weights read once
    sequence_s: float  # products of one sequence's token
    token_s: float  # one cached token read
    prefill_token_s: float
    max_sequences: int
    cache_tokens: int

    def steps_s(self, steps: int, running: int, cached: int) -> float:
        """Of `steps` decode steps of `running` sequences, with `cached` tokens before the first."""
        base = self.step_s + max(self.weights_s, self.sequence_s * running)
        return steps * base + self.token_s * (steps * cached + running * steps * (steps - 1) / 2)

    def steps_within(self, seconds: float, running: int, cached: int) -> int:
        """How many whole decode steps `seconds` are enough for; one that ends just then counts, rounding or not."""
        linear = self.step_s + max(self.weights_s, self.sequence_s * running)
        linear += self.token_s * (cached - running / 2)
        square = self.token_s * running / 2
        if square == 0:
            return int(seconds / linear + _ROUNDING)
        steps = (-linear + math.sqrt(linear * linear + 4 * square * max(seconds, 0.0))) / (2 * square)
        return int(steps + _ROUNDING)


@dataclass
class Response:
    """A response being written; `done` tokens of it are there."""

    name: int
    prompt: int
    length: int
    done: int = 0
    finished_at: float = math.inf  # seconds


class Engine:
    """`run` may be called again: with more sequences, or to go on from where `until` stopped it."""

    def __init__(self, model: EngineModel):
        self.model, self.clock = model, 0.0
        self.preemptions = 0
        self._waiting: deque[Response] = deque()
        self._running: list[tuple[int, int, Response]] = []  # (step it ends at, -order of admission, sequence)
        self._step = self._admitted = self._cached = 0

    def submit(self, sequences: Sequence[Response]) -> None:
        """Raises ValueError for a sequence that the empty cache cannot hold."""
        for sequence in sequences:
            if sequence.prompt + sequence.length > self.model.cache_tokens:
                raise ValueError(
                    f"a sequence of {sequence.prompt} + {sequence.length} tokens does not fit into an engine's cache "
                    f"of {self.model.cache_tokens} tokens; give the engine more GPUs or a larger share of their memory"
                )
        self._waiting.extend(sequences)

    def run(self, until: float = math.inf) -> None:
        """Write until everything is written, or up to the last step that ends by `until`."""
        while self._waiting or self._running:
            self._admit()
            room = (self.model.cache_tokens - self._cached) // len(self._running)
            if room == 0:
                self._preempt()
                continue
            steps = min(self._running[0][0] - self._step, room)
            if until < math.inf:
                fits = self.model.steps_within(until - self.clock, len(self._running), self._cached)
                if fits < steps:
                    self._advance(max(fits, 0))
                    self.clock = max(self.clock, until)
                    return
            self._advance(steps)

    def stop(self) -> list[Response]:
        """What is not finished, with what there is of it, in the order of submission; the engine is empty then."""
        for ends, _, sequence in self._running:
            sequence.done = sequence.length - (ends - self._step)
        left = sorted([*self._waiting, *(sequence for *_, sequence in self._running)], key=lambda s: s.name)
        self._waiting.clear()
        self._running.clear()
        self._cached = 0
        return left

    def _admit(self) -> None:
        model = self.model
        while self._waiting and len(self._running) < model.max_sequences:
            sequence = self._waiting[0]
            held = sequence.prompt + sequence.done
            room = model.cache_tokens - self._cached - held
            if self._running and room < HEADROOM * (len(self._running) + 1):
                return
            self._waiting.popleft()
            self.clock += model.prefill_token_s * held
            self._cached += held
            self._admitted += 1
            heappush(self._running, (self._step + sequence.length - sequence.done, -self._admitted, sequence))

    def _advance(self, steps: int) -> None:
        self.clock += self.model.steps_s(steps, len(self._running), self._cached)
        self._step += steps
        self._cached += steps * len(self._running)
        while self._running and self._running[0][0] <= self._step:
            _, _, sequence = heappop(self._running)
            sequence.done, sequence.finished_at = sequence.length, self.clock
            self._cached -= sequence.prompt + sequence.length

    def _preempt(self) -> None:
        place = min(range(len(self._running)), key=lambda i: self._running[i][1])
        ends, _, sequence = self._running.pop(place)
        heapify(self._running)
        sequence.done = sequence.length - (ends - self._step)
        self._cached -= sequence.prompt + sequence.done
        self._waiting.appendleft(sequence)
        self.preemptions += 1
