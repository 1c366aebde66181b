"""A checkpoint's tensors in an engine that keeps some of them as one: stretches of rows of the parameters there.

SGLang and vLLM do so in the same way for dense models; for an engine on one GPU or CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

# The engine's parameter that holds several of a checkpoint, in this order.
FUSED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EQUAL_PARTS = ("gate_up_proj",)  # each padded to the same size by itself, if at all


def checkpoint_tensors(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the checkpoint as a view of the parameter that holds it, without what the engine pads it with.

    Raises:
        KeyError: the engine has no such parameter.
    """
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
