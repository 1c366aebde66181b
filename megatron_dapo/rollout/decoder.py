"""A transformers model as a decoder: prompts once, then one token a row and step, over a KV cache of its own.

The layers are transformers' modules, called one after another; around them this file keeps what `generate` makes
anew at each step: the mask is built once, the cache is written in place, a row that is finished leaves the batch.
Of attention only the call is ours (`grouped_attention`), through transformers' `AttentionInterface`.
It leaves out: sliding windows, and rotary embeddings that change with the longest sequence of a batch.

Axes: `U` different prompts, `B` rows, `P` columns of the longest prompt, `V` vocabulary, `H` hidden.
A cache has shape [layers x 2, B, KV heads, columns, head size]. Prompts start at column 0 and are padded on the
right up to P; responses start at column P in every row, so that a step writes one column. Keys carry their rotary
position, so a gap between prompt and response needs a mask and nothing else.
"""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

FAMILIES = ("llama", "qwen2", "qwen3")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_ATTENTION = "megatron_dapo_grouped"


def build_model(model: str | Path | PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a Hugging Face config, in evaluation mode. Its weights are not those of any checkpoint.

    Raises:
        ValueError: a family, a layer type or a rotary embedding that the decoder does not run.
    """
    config = deepcopy(model) if isinstance(model, PreTrainedConfig) else AutoConfig.from_pretrained(model)
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type is {config.model_type!r}; the torch engine runs {', '.join(FAMILIES)}")
    settings = config.to_dict()
    layer_types = set(settings.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ValueError(
            f"layer_types has {sorted(layer_types)}; the torch engine runs full attention only: set "
            "use_sliding_window to false if no sequence is longer than the window"
        )
    rope_type = settings["rope_parameters"]["rope_type"]
    if rope_type not in _STATIC_ROPE:
        raise ValueError(f"rope_type is {rope_type!r}; the torch engine runs {', '.join(_STATIC_ROPE)}")
    with torch.random.fork_rng(devices=[]):  # the random weights that nobody uses cost no one a random number
        built = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    return built.to(device).eval().requires_grad_(False)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention without copies of keys and values for the query heads that share them.

    One query token: those heads become the query axis of one call, which needs no causality among them.
    More: plain causal attention from column 0, and no mask. Returns [B, tokens, heads, head size].
    """
    rows, heads, tokens, head_size = query.shape
    kv_heads = key.shape[1]
    if tokens == 1:
        grouped = query.reshape(rows, kv_heads, heads // kv_heads, head_size)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(rows, 1, heads, head_size), None
    gqa = heads != kv_heads
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, grouped_attention)


class LayerCache(Protocol):
    """What transformers' attention asks of a cache."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store the new columns of a layer; the keys and values that it attends to."""
        ...


class PromptCache:
    """Keys and values of U prompts, [U, KV heads, P, head size] a layer, as the layers made them."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.layers.append((key, value))
        return key, value


class DecodeCache:
    """Keys and values of the rows that still decode, and their positions.

    Memory grows by doubling, up to `limit` columns. `columns` are filled; a step writes the next one.
    """

    def __init__(self, prompts: PromptCache, prompt_of_B: Tensor, lengths_B: Tensor, limit: int):
        """`prompt_of_B`: each row's prompt; `lengths_B`: that prompt's tokens; `limit`: columns ever needed."""
        first = prompts.layers[0][0]
        kv_heads, self.columns, head_size = first.shape[1:]
        rows, self._limit = len(prompt_of_B), max(limit, self.columns)
        capacity = min(2 * self.columns, self._limit)
        self._store = first.new_empty(2 * len(prompts.layers), rows, kv_heads, capacity, head_size)
        for i, tensor in enumerate(t for layer in prompts.layers for t in layer):
            self._store[i, :, :, : self.columns] = tensor[prompt_of_B]
        padding_BP = torch.arange(self.columns, device=first.device) >= lengths_B[:, None]
        self._mask: Tensor | None = None  # [B, 1, 1, capacity], added to the scores; None where no prompt is padded
        if padding_BP.any():
            self._mask = first.new_zeros(rows, 1, 1, capacity)
            self._mask[..., : self.columns].masked_fill_(padding_BP[:, None, None], -math.inf)
        self.positions_B1 = lengths_B[:, None].clone()
        self._refresh(rows)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        keys, values = self._layers[2 * layer_idx], self._layers[2 * layer_idx + 1]
        end = self.columns + 1
        keys[:, :, self.columns : end] = key
        values[:, :, self.columns : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def mask(self) -> Tensor | None:
        """[B, 1, 1, columns + 1] for the step that writes the next column."""
        if self.columns == self._store.shape[3]:
            self._grow()
        return None if self._mask is None else self._mask[..., : self.columns + 1]

    def advance(self) -> None:
        """After a step: the column that it wrote counts as filled."""
        self.columns += 1
        self.positions_B1 = self.positions_B1 + 1

    def compact(self, holes: Tensor, movers: Tensor, rows: int) -> None:
        """Row movers[i] takes the place of holes[i]; rows from `rows` on are dropped."""
        if len(holes):
            filled = self._store[:, :, :, : self.columns]
            filled[:, holes] = filled[:, movers]
            self.positions_B1[holes] = self.positions_B1[movers]
            if self._mask is not None:
                self._mask[holes] = self._mask[movers]
        self._refresh(rows)

    def _refresh(self, rows: int) -> None:
        self.positions_B1 = self.positions_B1[:rows]
        self._mask = None if self._mask is None else self._mask[:rows]
        self._store = self._store[:, :rows]
        self._layers = list(self._store)

    def _grow(self) -> None:
        layers, rows, kv_heads, capacity, head_size = self._store.shape
        wanted = min(2 * capacity, self._limit)
        store = self._store.new_empty(layers, rows, kv_heads, wanted, head_size)
        store[:, :, :, :capacity] = self._store
        self._store = store
        if self._mask is not None:
            self._mask = nn.functional.pad(self._mask, (0, wanted - capacity))
        self._refresh(rows)


class Decoder:
    """The two forward passes of generation. Call them under `torch.inference_mode`."""

    def __init__(self, model: PreTrainedModel):
        self._body: Any = model.get_decoder()
        self._head: Any = model.get_output_embeddings()

    def prefill(self, tokens_UP: Tensor, lengths_U: Tensor) -> tuple[Tensor, PromptCache]:
        """The logits [U, V] after each prompt's last token, and all prompts' keys and values.

        Prompts are padded on the right with any token: causal attention never looks there.
        """
        prompts = PromptCache()
        positions_1P = torch.arange(tokens_UP.shape[1], device=tokens_UP.device)[None]
        hidden_UPH = self._layers(tokens_UP, positions_1P, None, prompts)
        last_UH = hidden_UPH[torch.arange(len(lengths_U), device=tokens_UP.device), lengths_U - 1]
        return self._head(self._body.norm(last_UH)), prompts

    def step(self, tokens_B: Tensor, cache: DecodeCache) -> Tensor:
        """The logits [B, V] after one more token in each row of the cache."""
        hidden_B1H = self._layers(tokens_B[:, None], cache.positions_B1, cache.mask(), cache)
        cache.advance()
        return self._head(self._body.norm(hidden_B1H[:, 0]))

    def _layers(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: LayerCache) -> Tensor:
        hidden = self._body.embed_tokens(tokens)
        rotary = self._body.rotary_emb(hidden, positions)
        for layer in self._body.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                position_embeddings=rotary,
            )
        return hidden
