"""Cards and assumptions, read from `hardware.yaml` or a file like it.

What is in the file is what the planner computes with; nothing of it is hidden in code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_dapo.config.tree import ConfigError

DEFAULT = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Card:
    """One GPU. Bytes, FLOP/s and bytes/s; `nvlink` and `network` are one direction of one GPU."""

    memory: float
    bf16_flops: float
    hbm: float
    nvlink: float
    network: float
    source: str


@dataclass(frozen=True)
class Assumptions:
    """See the comments of `hardware.yaml`."""

    matmul_efficiency: float
    attention_efficiency: float
    prefill_efficiency: float
    decode_efficiency: float
    hbm_efficiency: float
    nvlink_efficiency: float
    network_efficiency: float
    layer_floor_s: float
    decode_step_s: float
    decode_layer_s: float
    eager_layer_s: float
    step_overhead_s: float
    reserve_bytes: float
    engine_overhead_bytes: float
    engine_asleep_bytes: float
    pcie: float
    host_memory: float
    prompt_tokens: float
    response_share: float
    length_sigma: float
    length_between: float
    pass_rate: float
    pass_rate_concentration: float
    training_steps: float
    validation_prompts: float

    def items(self) -> list[tuple[str, float]]:
        return list(asdict(self).items())

    def with_settings(self, settings: Sequence[str]) -> Assumptions:
        """`NAME=VALUE` each.

        Raises:
            ConfigError: an unknown name, or a value that is no number of at least 0.
        """
        names = [field.name for field in fields(self)]
        found: dict[str, float] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in names:
                raise ConfigError(f"--assume {setting}: there is no assumption {name!r}; there are {', '.join(names)}")
            found[name] = _number(f"--assume {name}", text)
        return replace(self, **found)


@dataclass(frozen=True)
class Cluster:
    """What the run is planned on."""

    gpu: str
    card: Card
    nodes: int
    gpus_per_node: int
    assumptions: Assumptions

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        return self.card.memory - self.assumptions.reserve_bytes

    def link(self, ranks: int) -> float:
        """Bytes/s that one GPU sends to others of a group of `ranks` neighbours: NVLink inside a node, else network."""
        assumed = self.assumptions
        if ranks <= self.gpus_per_node:
            return self.card.nvlink * assumed.nvlink_efficiency
        return self.card.network * assumed.network_efficiency


def load_cluster(path: str | Path, gpu: str, nodes: int, gpus_per_node: int, assume: Sequence[str] = ()) -> Cluster:
    """Raises ConfigError for a file that is not as `hardware.yaml` is, and for a card that is not in it."""
    loaded = _read(Path(path))
    cards = {name: _section(Card, f"cards.{name}", card) for name, card in _mapping("cards", loaded).items()}
    if gpu not in cards:
        raise ConfigError(
            f"--gpu {gpu}: {path} has {', '.join(sorted(cards))}; add the card to a copy (--hardware FILE)"
        )
    if nodes < 1 or gpus_per_node < 1:
        raise ConfigError(f"{nodes} nodes of {gpus_per_node} GPUs: wanted at least 1 of each")
    assumptions = _section(Assumptions, "assumptions", _mapping("assumptions", loaded))
    return Cluster(gpu, cards[gpu], nodes, gpus_per_node, assumptions.with_settings(assume))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--hardware {path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"--hardware {path} is no mapping; wanted the sections cards and assumptions")
    return loaded


def _mapping(name: str, loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    found = loaded.get(name)
    if not isinstance(found, dict):
        raise ConfigError(
            f"the hardware file has no section {name}; wanted cards and assumptions, as in {DEFAULT.name}"
        )
    return found


def _section(cls: Any, where: str, values: Any) -> Any:
    wanted = {field.name for field in fields(cls)}
    found = set(values) if isinstance(values, dict) else set()
    if found != wanted:
        raise ConfigError(
            f"{where} of the hardware file lacks {sorted(wanted - found)} and has {sorted(found - wanted)} too many"
        )
    return cls(**{k: str(v) if k == "source" else _number(f"{where}.{k}", v) for k, v in values.items()})


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{name} is {value!r}: wanted a number of at least 0")
    return number
