"""Attention over packed sequences and families: as each sequence gives by itself, written out with complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_dapo.mcore.attention import PromptFamily, SDPAttention, TorchAttentionInputs
from megatron_dapo.mcore.parallel import RankLayout

HEADS, KV_HEADS, SIZE, THETA = 4, 2, 6, 100.0


@pytest.fixture
def attention(layout: RankLayout) -> SDPAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_query_groups=KV_HEADS
    )
    rotary = RotaryEmbedding(SIZE, 1.0, rotary_base=int(THETA), use_cpu_initialization=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return SDPAttention(config, 1, None, "self", rotary, pg_collection=groups)


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One sequence from position 0 on: query [t,h,d], key and value [t,h_kv,d] -> [t,h*d]."""
    pairs = torch.arange(SIZE // 2, dtype=torch.float64)
    angle = torch.arange(len(query), dtype=torch.float64)[:, None] * THETA ** (-2 * pairs / SIZE)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(x[..., : SIZE // 2], x[..., SIZE // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    q, k, v = turned(query), turned(key).repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(SIZE)
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), v).flatten(1)


def random_inputs(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = [(tokens, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


FAMILIES = {
    "lone sequences": (PromptFamily(5), PromptFamily(1), PromptFamily(3)),
    "a family between two": (PromptFamily(2), PromptFamily(3, (4, 1, 2)), PromptFamily(4)),
    "a response without tokens": (PromptFamily(3, (0, 2)),),
    "no response has tokens": (PromptFamily(2, (0, 0)), PromptFamily(1)),
    "a prompt of one token": (PromptFamily(1, (3, 3)),),
}


def sequences(families: tuple[PromptFamily, ...]) -> list[list[int]]:
    """Of each sequence, where its tokens lie."""
    found, start = [], 0
    for family in families:
        prompt, at = list(range(start, start + family.prompt)), start + family.prompt
        found += [] if family.responses else [prompt]
        for length in family.responses:
            found.append(prompt + list(range(at, at + length)))
            at += length
        start = at
    return found


@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES)
def test_every_sequence_attends_as_if_it_were_alone(attention: SDPAttention, families: tuple[PromptFamily, ...]):
    tokens = sum(family.tokens for family in families)
    inputs = random_inputs(tokens)
    positions = torch.zeros(tokens, dtype=torch.int64)
    wanted = torch.zeros(tokens, HEADS * SIZE, dtype=torch.float64)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for where in sequences(families):
        positions[where] = torch.arange(len(where))
        wanted[where] = by_hand(*(x[where] for x in inputs))  # a prompt's part is the same from each response
    found = attention(*inputs, packed_seq_params=TorchAttentionInputs.of(families, positions, packed=True))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the frequencies are fp32
    found_grads = torch.autograd.grad((found * weight).sum(), inputs)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), inputs)
    for got, want in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_rows_side_by_side_attend_each_by_itself(attention: SDPAttention):
    rows = [random_inputs(5), [-x for x in random_inputs(5)]]
    inputs = [torch.stack(parts, 1) for parts in zip(*rows, strict=True)]
    given = TorchAttentionInputs.of((PromptFamily(5),), torch.arange(5), packed=False)
    found = attention(*inputs, packed_seq_params=given)
    for index, row in enumerate(rows):
        torch.testing.assert_close(found[:, index], by_hand(*row), rtol=1e-6, atol=1e-6)
