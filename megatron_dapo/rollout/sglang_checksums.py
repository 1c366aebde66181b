"""Inside SGLang's process: checksums of the weights that it holds, under Hugging Face names.

SGLang calls `write_checksums` as a loader of weights of our own (`--custom-weight-loader`). It loads nothing. Nothing
of SGLang is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dapo.algo.checksum import checksum
from megatron_dapo.rollout.held_tensors import checkpoint_tensors

LOADER = f"{__name__}.write_checksums"


def pack_order(path: Path, shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, Tensor]]:
    """What `write_checksums` is sent: where to write, and the shape of each tensor that is wanted."""
    order = {"path": str(path), "shapes": {name: list(shape) for name, shape in shapes.items()}}
    return [("order", torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8))]


def write_checksums(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write {name: checksum} as JSON to the path of the order; raises KeyError: a tensor that the model lacks."""
    ((_, packed),) = named_tensors
    order: dict[str, Any] = json.loads(bytes(packed.cpu().numpy()))
    parameters = dict(model.named_parameters())
    found = {name: checksum(tensor) for name, tensor in checkpoint_tensors(parameters, order["shapes"])}
    Path(order["path"]).write_text(json.dumps(found))
