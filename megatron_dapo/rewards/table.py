"""The verifiers by name, and which of them judges a response: by its data source, with a default.

To add one: a builder below and a line in VERIFIERS. What a verifier returns is read by `verdict.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dapo.config.tree import ConfigError, CustomRewardFunctionConfig, RewardModelConfig
from megatron_dapo.rewards import math_dapo
from megatron_dapo.rewards.custom import check_file, load_function


@dataclass(frozen=True)
class RewardTask:
    """One response to be judged, and what its row says of it."""

    response: str
    ground_truth: str
    data_source: str
    extra_info: Mapping[str, Any] = field(default_factory=dict)


Verifier = Callable[[RewardTask], object]  # a number, or a mapping with `score`


@dataclass(frozen=True)
class VerifierSpec:
    """All that a worker needs to build its verifiers.

    Raises:
        ConfigError: a name that is not in the table, or a file that is not there.
    """

    default: str = "math_dapo"
    by_source: Mapping[str, str] = field(default_factory=dict)  # data source -> name
    strict_box_verify: bool = False
    fallback_boxed: bool = False
    custom_path: str | None = None
    custom_name: str = "compute_score"

    @staticmethod
    def from_config(config: RewardModelConfig, custom: CustomRewardFunctionConfig) -> VerifierSpec:
        """A custom function judges every data source that `reward_model.verifiers` does not name."""
        return VerifierSpec(
            default=config.default_verifier if custom.path is None else "custom",
            by_source=dict(config.verifiers),
            strict_box_verify=config.strict_box_verify,
            fallback_boxed=config.fallback_boxed,
            custom_path=None if custom.path is None else str(Path(custom.path).expanduser().absolute()),
            custom_name=custom.name,
        )

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in VERIFIERS:
                raise ConfigError(f"there is no verifier {name!r}; there are: {', '.join(VERIFIERS)}")
        if "custom" in self.names:
            if self.custom_path is None:
                raise ConfigError("the verifier 'custom' is asked for and custom_reward_function.path is not set")
            check_file(self.custom_path)

    @property
    def names(self) -> tuple[str, ...]:
        """The verifiers that are asked for."""
        return tuple(dict.fromkeys((self.default, *self.by_source.values())))


def build(spec: VerifierSpec) -> Verifier:
    """One verifier that hands each task to the one of its data source.

    Raises:
        ConfigError, Exception: as `load_function`.
    """
    verifiers = {name: VERIFIERS[name](spec) for name in spec.names}
    return lambda task: verifiers[spec.by_source.get(task.data_source, spec.default)](task)


def _math_dapo(spec: VerifierSpec) -> Verifier:
    def verify(task: RewardTask) -> dict[str, object]:
        found = math_dapo.score(task.response, task.ground_truth, spec.strict_box_verify, spec.fallback_boxed)
        pred = math_dapo.NO_ANSWER if found.pred is None else found.pred
        return {"score": found.score, "acc": found.acc, "pred": pred}

    return verify


def _math_verify(spec: VerifierSpec) -> Verifier:
    from megatron_dapo.rewards import math_verify  # a second to import: only for runs that use it

    def verify(task: RewardTask) -> dict[str, object]:
        found = math_verify.score(task.response, task.ground_truth)
        return {"score": found.score, "acc": found.acc, "pred": found.pred}

    return verify


def _custom(spec: VerifierSpec) -> Verifier:
    assert spec.custom_path is not None  # VerifierSpec checks it
    function = load_function(spec.custom_path, spec.custom_name)
    return lambda task: function(
        data_source=task.data_source,
        solution_str=task.response,
        ground_truth=task.ground_truth,
        extra_info=task.extra_info,
    )


VERIFIERS: dict[str, Callable[[VerifierSpec], Verifier]] = {
    "math_dapo": _math_dapo,
    "math_verify": _math_verify,
    "custom": _custom,
}
