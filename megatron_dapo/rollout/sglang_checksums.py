"""Inside a process of SGLang's: checksums of the weights that it holds, under Hugging Face names.

SGLang calls `write_checksums` as a loader of weights of our own (`--custom-weight-loader`). It loads nothing. Nothing
of SGLang is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dapo.rollout.held_tensors import EngineRank, rank_checksums

LOADER = f"{__name__}.write_checksums"


def pack_order(path: Path, shapes: Mapping[str, Sequence[int]], rank: EngineRank) -> list[tuple[str, Tensor]]:
    """What `write_checksums` of this rank is sent: where to write, and the shape of each tensor that is wanted."""
    order = {
        "path": str(path),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "rank": asdict(rank),
    }
    return [("order", torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8))]


def write_checksums(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write {name: this rank's part of its checksum} as JSON to the path of the order.

    Raises:
        KeyError: a tensor that the model lacks.
    """
    ((_, packed),) = named_tensors
    order: dict[str, Any] = json.loads(bytes(packed.cpu().numpy()))
    parameters = dict(model.named_parameters())
    found = rank_checksums(parameters, order["shapes"], EngineRank(**order["rank"]))
    Path(order["path"]).write_text(json.dumps(found))
