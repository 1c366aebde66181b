"""Rollouts of several training steps under four policies, simulated: time, wasted tokens, and the length bias.

- `rounds`, the DAPO recipe: whole generation batches until enough groups are kept; the surplus is thrown away.
- `adaptive`, this project (`data/dynamic_sampling.py`): the next batch is as large as the pass rate asks; the surplus
  is carried to the next step (`filter_groups.surplus`).
- `oversample`: more prompts than needed at once; the first groups that finish are taken and the rest is aborted.
- `partial`: likewise, but what was aborted is continued in the next step.

Draws go to engines in turn, all responses of a draw to one engine, as the driver spreads them (`workers/rollout.py`).
Axes: `P` prompts, `n` responses each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_dapo.data.demand import PassRate
from megatron_dapo.plan.engine_sim import Engine, EngineModel, Response
from megatron_dapo.plan.workload import Workload


@dataclass(frozen=True)
class RolloutSettings:
    """Numbers of prompts, but for `engines`. `max_batches`: generation batches a step; 0: no limit."""

    engines: int
    wanted: int
    batch: int
    max_batches: int = 0
    carry: bool = True  # `adaptive` carries its surplus; false: it is thrown away there too
    margin: float = 1.2  # prompts that `oversample` and `partial` launch, over wanted / kept share


@dataclass(frozen=True)
class StepRollout:
    """One training step's rollout. Tokens are responses'."""

    seconds: float
    batches: int
    prompts: int  # drawn
    lengths: np.ndarray  # [wanted x n] of what is trained on, in the order taken
    written: int
    dropped: int  # of groups that the filter dropped
    discarded: int  # of kept groups that were not wanted any more, or of aborted responses
    preemptions: int


@dataclass(frozen=True)
class PolicyOutcome:
    """Means over steps."""

    policy: str
    seconds: float
    batches: float
    prompts: float
    written: float  # tokens
    dropped_share: float  # of the tokens written
    discarded_share: float
    length_bias: float  # mean length trained on / mean length of all kept groups that were drawn, - 1
    preemptions: float
    steps: tuple[StepRollout, ...]


@dataclass
class _Group:
    draw: int
    kept: bool
    responses: list[Response]

    @property
    def tokens(self) -> int:
        return sum(r.length for r in self.responses)

    @property
    def closed_at(self) -> float:
        return max(r.finished_at for r in self.responses)


@dataclass
class _Fleet:
    """The engines, and where draws come from."""

    model: EngineModel
    settings: RolloutSettings
    workload: Workload
    rng: np.random.Generator
    drawn: list[_Group] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)

    def draw(self, count: int) -> list[_Group]:
        found, start = self.workload.draw(count, self.rng), len(self.drawn)
        n = self.workload.n
        groups = [
            _Group(
                start + i,
                bool(found.kept[i]),
                [Response((start + i) * n + j, int(found.prompts[i]), int(found.lengths[i, j])) for j in range(n)],
            )
            for i in range(count)
        ]
        self.drawn += groups
        return groups

    def write(self, groups: Sequence[_Group]) -> float:
        """All of them on idle engines; how long it takes."""
        self.submit(groups)
        for engine in self.engines:
            engine.run()
        return max(engine.clock for engine in self.engines)

    def submit(self, groups: Sequence[_Group]) -> None:
        self.engines = [Engine(self.model) for _ in range(self.settings.engines)]
        for number, group in enumerate(groups):
            self.engines[number % len(self.engines)].submit([r for r in group.responses if r.done < r.length])

    @property
    def preemptions(self) -> int:
        return sum(engine.preemptions for engine in self.engines)


def simulate(
    policy: str, model: EngineModel, settings: RolloutSettings, workload: Workload, steps: int = 3, seed: int = 0
) -> PolicyOutcome:
    """`steps` training steps one after another, from a pass rate that is known already.

    Raises:
        ValueError: no such policy, or a response that an engine's cache cannot hold.
    """
    if policy not in POLICIES:
        raise ValueError(f"there is no policy {policy!r}; there are {', '.join(POLICIES)}")
    fleet = _Fleet(model, settings, workload, np.random.default_rng(seed))
    done = tuple(POLICIES[policy](fleet, steps))
    written = sum(step.written for step in done)
    trained = np.concatenate([step.lengths for step in done])
    possible = [r.length for group in fleet.drawn if group.kept for r in group.responses]

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    return PolicyOutcome(
        policy=policy,
        seconds=mean([step.seconds for step in done]),
        batches=mean([step.batches for step in done]),
        prompts=mean([step.prompts for step in done]),
        written=written / len(done),
        dropped_share=sum(step.dropped for step in done) / written,
        discarded_share=sum(step.discarded for step in done) / written,
        length_bias=float(trained.mean() / np.mean(possible) - 1) if len(trained) else 0.0,
        preemptions=mean([step.preemptions for step in done]),
        steps=done,
    )


def _in_batches(fleet: _Fleet, steps: int, adaptive: bool) -> list[StepRollout]:
    """`rounds` and `adaptive`: a generation batch after the other, each awaited to its end."""
    settings, share = fleet.settings, fleet.workload.kept_share
    rate = PassRate().after(settings.batch, round(share * settings.batch), settings.batch)
    carried: list[_Group] = []
    done = []
    for _ in range(steps):
        ready, seconds, batches, drawn, preemptions = carried, 0.0, 0, 0, 0
        written = dropped = 0
        while len(ready) < settings.wanted and (not settings.max_batches or batches < settings.max_batches):
            missing = settings.wanted - len(ready)
            filtered = share < 1
            count = rate.demand(missing, settings.batch) if adaptive and filtered else settings.batch
            groups = fleet.draw(min(count, missing) if not filtered else count)
            seconds += fleet.write(groups)
            batches, drawn, preemptions = batches + 1, drawn + len(groups), preemptions + fleet.preemptions
            kept = [group for group in groups if group.kept]
            rate = rate.after(len(groups), len(kept), settings.batch)
            written += sum(group.tokens for group in groups)
            dropped += sum(group.tokens for group in groups if not group.kept)
            ready = ready + kept
        used, rest = ready[: settings.wanted], ready[settings.wanted :]
        carried = rest if adaptive and settings.carry else []
        discarded = 0 if carried else sum(group.tokens for group in rest)
        done.append(StepRollout(seconds, batches, drawn, _lengths(used), written, dropped, discarded, preemptions))
    return done


def _first_finished(fleet: _Fleet, steps: int, keep_partial: bool) -> list[StepRollout]:
    """`oversample` and `partial`: the first groups that close are taken, the rest is aborted."""
    settings = fleet.settings
    launch = math.ceil(settings.margin * settings.wanted / fleet.workload.kept_share)
    left: list[_Group] = []
    done = []
    for _ in range(steps):
        ready: list[_Group] = []
        seconds, batches, drawn, preemptions = 0.0, 0, 0, 0
        written = dropped = discarded = 0
        while len(ready) < settings.wanted and (not settings.max_batches or batches < settings.max_batches):
            fresh = fleet.draw(max(launch - len(left), settings.wanted - len(ready) - len(left), 1))
            open_groups, left = [*left, *fresh], []
            before = sum(r.done for group in open_groups for r in group.responses)
            end, taken = _until_enough(fleet, open_groups, settings.wanted - len(ready))
            seconds, batches, drawn = seconds + end, batches + 1, drawn + len(fresh)
            preemptions += fleet.preemptions
            written += sum(r.done for group in open_groups for r in group.responses) - before
            closed = [group for group in open_groups if group.closed_at <= end]
            dropped += sum(group.tokens for group in closed if not group.kept)
            names = {group.draw for group in taken}
            unused = [group for group in closed if group.kept and group.draw not in names]
            discarded += sum(group.tokens for group in unused)
            aborted = [group for group in open_groups if group.closed_at > end]
            if keep_partial:
                left = aborted
            else:
                discarded += sum(r.done for group in aborted for r in group.responses)
            ready += taken
        done.append(StepRollout(seconds, batches, drawn, _lengths(ready), written, dropped, discarded, preemptions))
    return done


def _until_enough(fleet: _Fleet, groups: Sequence[_Group], missing: int) -> tuple[float, list[_Group]]:
    """Write until `missing` kept groups are closed, or all; (seconds, the groups taken, first closed first).

    Engines do not know of each other, so a first run to the end says when that is, and a second stops there.
    """
    before = [(r, r.done) for group in groups for r in group.responses]
    for response, _ in before:
        response.finished_at = 0.0 if response.done == response.length else math.inf
    end = fleet.write(groups)
    kept = sorted((group for group in groups if group.kept), key=lambda group: (group.closed_at, group.draw))
    if len(kept) < missing:
        return end, kept
    end = kept[missing - 1].closed_at
    finished = {group.draw for group in kept[:missing]}
    for response, done in before:
        if response.finished_at > 0.0:
            response.done, response.finished_at = done, math.inf
    fleet.submit(groups)
    for engine in fleet.engines:
        engine.run(until=end)
        engine.stop()
    taken = [group for group in groups if group.draw in finished]
    return end, sorted(taken, key=lambda group: (group.closed_at, group.draw))


def _lengths(groups: Sequence[_Group]) -> np.ndarray:
    return np.array([r.length for group in groups for r in group.responses], np.int64)


POLICIES: Mapping[str, Callable[[_Fleet, int], list[StepRollout]]] = {
    "rounds": lambda fleet, steps: _in_batches(fleet, steps, adaptive=False),
    "adaptive": lambda fleet, steps: _in_batches(fleet, steps, adaptive=True),
    "oversample": lambda fleet, steps: _first_finished(fleet, steps, keep_partial=False),
    "partial": lambda fleet, steps: _first_finished(fleet, steps, keep_partial=True),
}
