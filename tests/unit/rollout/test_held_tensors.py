"""A checkpoint's tensors as stretches of the parameters that engines keep them in."""

from __future__ import annotations

import pytest
import torch

from megatron_dapo.rollout.held_tensors import checkpoint_tensors


def test_fused_and_padded_parameters_are_taken_apart() -> None:
    q, k, v = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2, 3)
    gate, up = torch.randn(5, 3), torch.randn(5, 3)
    embedding = torch.randn(7, 3)
    pad = torch.zeros(1, 3)
    held = {
        "l.qkv_proj.weight": torch.cat([q, k, v]),
        "l.qkv_proj.bias": torch.cat([q[:, 0], k[:, 0], v[:, 0]]),
        "m.gate_up_proj.weight": torch.cat([gate, pad, up, pad]),
        "embed.weight": torch.cat([embedding, pad]),
    }
    wanted = {
        "l.q_proj.weight": q,
        "l.k_proj.weight": k,
        "l.v_proj.weight": v,
        "l.q_proj.bias": q[:, 0],
        "l.k_proj.bias": k[:, 0],
        "l.v_proj.bias": v[:, 0],
        "m.gate_proj.weight": gate,
        "m.up_proj.weight": up,
        "embed.weight": embedding,
    }
    found = dict(checkpoint_tensors(held, {name: tensor.shape for name, tensor in wanted.items()}))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_a_tensor_that_the_engine_lacks_is_named() -> None:
    with pytest.raises(KeyError, match=r"norm\.weight"):
        dict(checkpoint_tensors({}, {"norm.weight": [3]}))
