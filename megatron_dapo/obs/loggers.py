"""Where metrics go. `metrics.jsonl` is always written, and first; the rest are what `trainer.logger` names.

Add a logger: a class with `log` and `close` that is made from a `RunInfo`, and its line in `LOGGERS`.
"""

from __future__ import annotations

import difflib
import secrets
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.obs.console import ConsoleLogger
from megatron_dapo.obs.jsonl import JsonlWriter
from megatron_dapo.obs.run_info import RunInfo


class Logger(Protocol):
    id: str  # under which the run is known to the logger's server; empty where there is none

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one step; steps rise."""
        ...

    def close(self) -> None: ...


class JsonlLogger:
    """`metrics.jsonl`: one object a step, keys sorted."""

    id = ""

    def __init__(self, run: RunInfo) -> None:
        self._writer = JsonlWriter(run.directory / "metrics.jsonl", run.first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._writer.write({"step": step, **dict(sorted(metrics.items()))})

    def close(self) -> None:
        self._writer.close()


class TensorBoardLogger:
    """Event files under `tensorboard/`; steps from `first_step` on of an earlier run are purged."""

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = str(run.directory / "tensorboard")
        self._writer = SummaryWriter(self.id, purge_step=run.first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases. Offline with its own `WANDB_MODE=offline`; a resumed run continues the same page.

    The page's id is kept in `wandb_id` and in checkpoints, for a run that goes on in another folder. Steps go in as a
    metric of their own, because wandb drops what is logged for a step that it has already seen, and a resumed run
    repeats some.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, run: RunInfo) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ConfigError(
                "trainer.logger names wandb, which is not installed; install it (pip install 'megatron-dapo[wandb]') "
                "or take it out of trainer.logger"
            ) from error
        id_file = run.directory / "wandb_id"
        if run.first_step == 0 or not id_file.exists():
            id_file.write_text(run.logger_ids.get("wandb", secrets.token_hex(4)))
        self.id = id_file.read_text()
        self._run = wandb.init(
            project=run.project,
            name=run.experiment,
            id=self.id,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.config),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


MakeLogger = Callable[[RunInfo], Logger]

LOGGERS: dict[str, MakeLogger] = {
    "console": ConsoleLogger,
    "jsonl": JsonlLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


class Loggers:
    """All loggers of a run behind one `log`. A context manager: leaving it closes them.

    A logger that fails while the run goes on is switched off with a warning that holds its traceback, and is
    listed in `failures` (name -> what happened); metrics.jsonl alone may not fail.
    """

    def __init__(self, names: Sequence[str], run: RunInfo, table: Mapping[str, MakeLogger] = LOGGERS) -> None:
        """
        Raises:
            ConfigError: a name that is not in the table, or a logger whose library is missing.
        """
        for name in names:
            if name not in table:
                near = difflib.get_close_matches(name, table, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"trainer.logger: unknown logger {name!r}; {hint}there are {', '.join(table)}")
        run.directory.mkdir(parents=True, exist_ok=True)
        self.failures: dict[str, str] = {}
        self._console, self._last_step = run.console, run.first_step - 1
        self._others: dict[str, Logger] = {}
        try:
            for name in dict.fromkeys(names):
                if name != "jsonl":
                    self._others[name] = table[name](run)
            self._jsonl = JsonlLogger(run)  # last: it cuts the file, which nobody wants from a run that cannot start
        except BaseException:
            self._close_others()
            raise

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """
        Raises:
            ValueError: `step` does not come after the last one.
            OSError: metrics.jsonl cannot be written.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} was logged after step {self._last_step}; log a step once, and in order")
        self._last_step = step
        self._jsonl.log(step, metrics)
        for name, logger in self._others.items():
            if name not in self.failures:
                try:
                    logger.log(step, metrics)
                except Exception as error:
                    self._report(name, f"failed at step {step} and is off for the rest of this run", error)

    def ids(self) -> dict[str, str]:
        """Name -> id of each logger that has one."""
        return {name: logger.id for name, logger in self._others.items() if logger.id}

    def close(self) -> None:
        """Close every logger, those switched off too. A second call does nothing more."""
        self._close_others()
        self._jsonl.close()

    def _close_others(self) -> None:
        while self._others:
            name, logger = self._others.popitem()
            try:
                logger.close()
            except Exception as error:
                self._report(name, "could not be closed", error)

    def _report(self, name: str, what: str, error: Exception) -> None:
        self.failures.setdefault(name, f"{what}: {type(error).__name__}: {error}")
        text = f"WARNING: logger {name} {what}; metrics.jsonl has every step.\n{traceback.format_exc()}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
