"""The test's end of the ranks: it starts each world once, and sends it cases with their answers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import Pipe
from pathlib import Path

from tests.functional import oracle
from tests.functional.layout_cases import CLIP, LR, Case, Deviations, Job
from tests.functional.layout_problem import FORMULAS, Formula, Problem, Rollouts, make_problem, ordinary_rollouts
from tests.functional.oracle import Answer
from tests.functional.tiny_models import VOCAB, save_tiny_model

WORKER = Path(__file__).with_name("layout_worker.py")
ROOT = Path(__file__).parents[2]


class Ranks:
    """The process that imports Megatron and forks the ranks of one world after the other."""

    def __init__(self, folder: Path):
        self._log = folder / "ranks.log"
        self._connection, theirs = Pipe()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), str(theirs.fileno())],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
            )
        theirs.close()  # so that the end of the ranks is the end of the connection

    @contextmanager
    def world(self, size: int) -> Iterator[None]:
        """`size` ranks, until the context ends."""
        self._size, self._up = size, False
        yield
        if self._up:
            self._send(None)

    def ask(self, job: Job) -> Deviations:
        """What all ranks of the present world find, the largest of each; they are started anew where one has failed."""
        found: Deviations | str  # a string is what is said of ranks that failed
        try:
            if not self._up:
                self._send(self._size)
            self._send(job)
            found = self._connection.recv()
        except (EOFError, BrokenPipeError):
            found = "the process that starts the ranks is gone"
        self._up = not isinstance(found, str)
        if isinstance(found, str):
            raise AssertionError(f"{found}\n{self._log.read_text()[-6000:]}")
        return found

    def _send(self, what: Job | int | None) -> None:
        # The connection's own pickler would pass tensors on as file descriptors, which forks cannot fetch.
        self._connection.send_bytes(pickle.dumps(what))

    def close(self) -> None:
        if self._process.poll() is None:
            self._send(None)
        self._process.wait(60)
        self._connection.close()


class Answers:
    """Models, problems and the oracle's answers, each made once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.rollouts = ordinary_rollouts()
        self.model = cache(self._make_model)
        self.of = cache(self._answer)
        self.bf16_error = cache(self._bf16_error)

    def job(self, case: Case) -> Job:
        path = self.model(case.model, case.layers, bf16=case.bf16)
        problem, answer = self.of(path, case.formula, case.steps)
        return Job(case, str(path), problem, FORMULAS[case.formula], answer)

    def _make_model(self, name: str, layers: int, vocab: int = VOCAB, bf16: bool = False) -> Path:
        path = self._folder / f"{name} {layers} {vocab} {bf16}".replace(" ", "-")
        family, _, tied = name.partition(" ")
        sharpness = 1.0 if bf16 else 4.0
        save_tiny_model(path, family, tied == "tied", layers, vocab=vocab, sharpness=sharpness, bf16=bf16)
        return path

    def _answer(self, path: Path, formula: str, steps: int) -> tuple[Problem, Answer]:
        return solve(path, self.rollouts, FORMULAS[formula], steps)

    def _bf16_error(self, case: Case) -> Deviations:
        path = self.model(case.model, case.layers, bf16=True)
        problem, answer = self.of(path, case.formula, case.steps)
        return oracle.bf16_error(path, problem, FORMULAS[case.formula], answer)


def solve(path: Path, rollouts: Rollouts, formula: Formula, steps: int) -> tuple[Problem, Answer]:
    problem = make_problem(rollouts, lambda batch: oracle.all_logp(path, batch, formula.temperature), formula)
    return problem, oracle.answer(path, problem, formula, LR, CLIP, steps)


def beyond(found: Deviations, tolerance: float) -> Deviations:
    """The deviations that the tolerance does not allow; NaN is one."""
    assert found
    return {what: value for what, value in found.items() if not value <= tolerance}
