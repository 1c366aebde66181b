"""Inside SGLang's process: checksums of the weights that it holds, under Hugging Face names.

SGLang calls `write_checksums` as a loader of weights of our own (`--custom-weight-loader`). It loads nothing.
SGLang keeps some tensors of a checkpoint as one, and pads the vocabulary: a tensor here is a stretch of rows of a
parameter there. For one GPU or CPU an engine and dense models; nothing of SGLang is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dapo.algo.checksum import checksum

LOADER = f"{__name__}.write_checksums"
# The parameter of SGLang that holds several of a checkpoint, in this order.
FUSED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

EQUAL_PARTS = ("gate_up_proj",)  # each padded to the same size by itself


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


def checkpoint_tensors(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the checkpoint as a view of the parameter that holds it, without what SGLang pads it with."""
    whole_of = {part: (whole, parts) for whole, parts in FUSED.items() for part in parts}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        held, start = name, 0
        if leaf in whole_of:
            whole, parts = whole_of[leaf]
            held = f"{parent}.{whole}.{kind}"
            before = parts[: parts.index(leaf)]
            if whole in EQUAL_PARTS:
                start = len(before) * (len(parameters[held]) // len(parts))
            else:
                start = sum(shapes[f"{parent}.{part}.{kind}"][0] for part in before)
        places = [slice(start, start + shape[0]), *(slice(size) for size in shape[1:])]
        yield name, parameters[held][tuple(places)]
