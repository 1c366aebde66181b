"""Attention and norm for machines without Transformer Engine: torch's own kernels under Megatron's names.

Megatron's local attention refuses packed sequences and context parallelism, its local norm refuses sequence
parallelism; these two do not. With Transformer Engine neither is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; marks its weight, so that Megatron sums its gradient over tensor-parallel ranks under SP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass(frozen=True)
class PromptFamily:
    """`prompt` tokens, and after them responses that each see the prompt and themselves; lengths in tokens."""

    prompt: int
    responses: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class _Responses:
    """The responses of a family side by side: `pad` [G*R] takes them from one after another, `unpad` puts them back."""

    pad: torch.Tensor  # of the family's response tokens; the first one where there is none
    unpad: torch.Tensor  # of the G*R places
    mask: torch.Tensor  # [R, prompt + R] what each place sees

    @staticmethod
    def of(family: PromptFamily, device: torch.device) -> _Responses:
        lengths = torch.tensor(family.responses)
        longest = int(lengths.max())
        place = torch.arange(longest)
        there = place < lengths[:, None]  # [G, R]
        pad = (torch.where(there, place + (lengths.cumsum(0) - lengths)[:, None], 0)).flatten()
        mask = torch.ones(longest, family.prompt + longest, dtype=torch.bool).tril(family.prompt)
        return _Responses(pad.to(device), there.flatten().nonzero()[:, 0].to(device), mask.to(device))


@dataclass
class TorchAttentionInputs(PackedSeqParams):
    """What `SDPAttention` wants of a micro-batch. It goes by the way of Megatron's own argument for packed sequences.

    `t` tokens on this rank; without packing, of each row.
    """

    positions: torch.Tensor | None = None  # [t] in the sequence
    families: tuple[tuple[PromptFamily, _Responses | None], ...] = ()  # one after another, t tokens in all

    @staticmethod
    def of(families: tuple[PromptFamily, ...], positions: torch.Tensor, packed: bool) -> TorchAttentionInputs:
        pairs = [(f, _Responses.of(f, positions.device) if any(f.responses) else None) for f in families]
        return TorchAttentionInputs("thd" if packed else "sbhd", positions=positions, families=tuple(pairs))


class SDPAttention(MegatronModule):
    """Causal grouped-query attention with rotary positions on `scaled_dot_product_attention`.

    Packed sequences run one by one, which is 2 to 11 times faster on a CPU than one block-diagonal mask; the responses
    of a family side by side. Under context parallelism keys and values are gathered; rank i holds chunks i and 2n-1-i
    of each sequence. Positions are turned here and not in Megatron, which knows only sequences that begin at 0.
    Axes: `t` tokens on this rank, `b` sequences side by side, `h` heads, `d` head size, `n` context-parallel size,
    `G` responses of a family, `R` tokens of its longest one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        rotary: RotaryEmbedding,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ):
        super().__init__(config=config)
        assert pg_collection is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 0)
        self.cp_group = pg_collection.cp
        self._frequencies: torch.Tensor = rotary.inv_freq  # [d/2]; no parameter and in no checkpoint

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: TorchAttentionInputs | None = None,
    ) -> torch.Tensor:
        """query [t,b,h,d] and key, value [t,b,h_kv,d], or without b where packed -> [t,b,h*d] or [t,h*d]."""
        assert packed_seq_params is not None
        assert packed_seq_params.positions is not None
        packed = query.dim() == 3
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        query, key = self._turned(query, key, packed_seq_params.positions)
        n = self.cp_group.size()
        if n > 1:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group).view(n, -1, *x.shape[1:])
                for x in (key, value)
            )
        # `split`, not slices: its backward is one concatenation, theirs a zero-filled whole for each sequence.
        lengths = [family.tokens for family, _ in packed_seq_params.families]
        parts = zip(query.split(lengths), key.split(lengths, -4), value.split(lengths, -4), strict=True)
        out = [
            self._attend(*part) if responses is None else self._attend_family(*part, family.prompt, responses)
            for part, (family, responses) in zip(parts, packed_seq_params.families, strict=True)
        ]
        joined = torch.cat(out) if len(out) > 1 else out[0]
        joined = joined.reshape(joined.size(0), joined.size(1), -1)
        return joined.squeeze(1) if packed else joined

    def _turned(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.outer(positions.to(self._frequencies), self._frequencies)[:, None, None, :]
        cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        return _Turn.apply(query, cos, sin), _Turn.apply(key, cos, sin)  # type: ignore[return-value]

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One sequence (or b equally long ones): query [t,b,h,d], key and value [t,b,h_kv,d] or [n,t,b,h_kv,d]."""
        n, mask = self.cp_group.size(), None
        if n > 1:
            key, value = _in_order(key), _in_order(value)
            mask = _causal_mask(len(query), n, self.cp_group.rank(), query.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return self._sdpa(q, k, v, mask).permute(2, 0, 1, 3)

    def _attend_family(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prompt: int, responses: _Responses
    ) -> torch.Tensor:
        """A prompt and its G responses, one after another: query [t,1,h,d], key and value [t,1,h_kv,d]."""
        places = len(responses.mask)
        (q0, q), (k0, k), (v0, v) = (x.split([prompt, len(x) - prompt]) for x in (query, key, value))
        # [t,1,h,d] -> [G,R,h,d] -> [G,h,R,d], and the prompt before each response's keys and values
        q, k, v = (x[responses.pad].view(-1, places, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        k, v = (
            torch.cat([head.permute(1, 2, 0, 3).expand(len(x), -1, -1, -1), x], dim=2) for head, x in ((k0, k), (v0, v))
        )
        out = self._sdpa(q, k, v, responses.mask).transpose(1, 2)
        return torch.cat([self._attend(q0, k0, v0), out.flatten(0, 1)[responses.unpad][:, None]])

    def _sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


class _Turn(torch.autograd.Function):
    """Rotary positions (arXiv 2104.09864, eq. 34; halves, not neighbours, make a pair): x [t,b,h,d] by [t,1,1,d/2]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(d_out, cos, -sin), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """[n, t, ...] as the ranks hold it -> [n*t, ...] in the order of the sequence."""
    half = x.size(1) // 2
    return torch.cat([x[i, :half] for i in range(len(x))] + [x[i, half:] for i in reversed(range(len(x)))])


def _causal_mask(local: int, cp_size: int, cp_rank: int, device: torch.device) -> torch.Tensor:
    """[local, local*cp_size]: which keys this rank's queries see."""
    half, last = local // 2, 2 * cp_size - 1 - cp_rank
    queries = torch.cat(
        [torch.arange(cp_rank * half, (cp_rank + 1) * half), torch.arange(last * half, (last + 1) * half)]
    ).to(device)
    return torch.arange(local * cp_size, device=device)[None, :] <= queries[:, None]
