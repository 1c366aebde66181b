"""Megatron in one process, and by hand what its parameters should look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.mcore.families import FAMILIES, ModelShape, shape_of
from megatron_dapo.mcore.model import build_model
from megatron_dapo.mcore.optimizer import build_optimizer, wrap_for_training
from megatron_dapo.mcore.parallel import RankLayout, initialize, shutdown
from megatron_dapo.mcore.weights import load_hf

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer.optimizer import ChainedOptimizer

SHAPE = ModelShape(
    family=FAMILIES["qwen2"],
    num_layers=2,
    hidden_size=6,
    ffn_hidden_size=8,
    num_heads=4,
    num_kv_heads=4,
    head_dim=2,
    vocab_size=11,
    tied=False,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling_factor=None,
    max_positions=64,
)
QWEN_32B = replace(
    SHAPE,
    num_layers=64,
    hidden_size=5120,
    ffn_hidden_size=27648,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=152064,
    norm_eps=1e-5,
    rope_theta=1e6,
    max_positions=131072,
)  # Qwen2.5-32B
DISTRIBUTED, PLAIN = MegatronConfig(use_distributed_optimizer=True), MegatronConfig(use_distributed_optimizer=False)
OPTIMIZERS = {
    "distributed": DISTRIBUTED,
    "plain": PLAIN,
    "distributed, bf16": replace(DISTRIBUTED, params_dtype="bfloat16"),
    "plain, bf16": replace(PLAIN, params_dtype="bfloat16"),
}
# Transformer Engine's fused name of each norm that the local layer spec keeps apart.
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
ONE = RankLayout(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, cp_rank=0, cp_size=1, dp_rank=0, dp_size=1)


def rank_of(**where: int) -> RankLayout:
    """The only rank, but for what is given."""
    return replace(ONE, **where)


@contextmanager
def one_process() -> Iterator[RankLayout]:
    """Megatron's process groups over this process alone."""
    layout = initialize(MegatronConfig(), seed=1)
    try:
        yield layout
    finally:
        shutdown()


def load_model(path: Path, config: MegatronConfig | None = None) -> tuple[list[GPTModel], ModelShape]:
    shape = shape_of(AutoConfig.from_pretrained(path))
    chunks = build_model(shape, config or MegatronConfig())
    load_hf(chunks, shape, path)
    return chunks, shape


def save_model(chunks: Sequence[GPTModel], folder: Path) -> Path:
    """The model alone, by Megatron's own `dist_checkpointing`, into the new `folder`."""
    from megatron.core import dist_checkpointing

    folder.mkdir()
    dist_checkpointing.save({str(i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}, str(folder))
    return folder


@dataclass(frozen=True)
class Training:
    """A model with its optimizer, fed with made-up gradients."""

    chunks: Sequence[GPTModel]
    modules: Sequence[DistributedDataParallel]
    optimizer: ChainedOptimizer

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.chunks[0].named_parameters())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: param.detach().clone() for name, param in self.parameters.items()}

    def moments(self) -> list[torch.Tensor]:
        """Copies of all that Adam remembers."""
        states = [state for part in self.optimizer.chained_optimizers for state in part.optimizer.state.values()]
        return [tensor.clone() for state in states for _, tensor in sorted(state.items())]

    def set_gradients(self, seed: int | None) -> None:
        """Normal deviates; None: zeros."""
        draw = torch.Generator().manual_seed(seed or 0)
        for param in self.parameters.values():
            param.main_grad.copy_(torch.randn(param.shape, generator=draw) * (seed is not None))


def start_training(
    path: Path, optim: OptimConfig | None = None, megatron: MegatronConfig | None = None, grad_clip: float = 1.0
) -> Training:
    config = megatron or MegatronConfig()
    chunks, _ = load_model(path, config)
    modules = wrap_for_training(chunks, config)
    return Training(chunks, modules, build_optimizer(modules, optim or OptimConfig(), config, grad_clip))


def local_shapes(shape: ModelShape, tp_size: int, fused_norms: bool) -> dict[str, tuple[int, ...]]:
    """Every parameter of one tensor-parallel rank that holds all layers, under Megatron's name."""
    hidden, q = shape.hidden_size, shape.num_heads * shape.head_dim
    qkv = (q + 2 * shape.num_kv_heads * shape.head_dim) // tp_size
    vocab = -(-shape.vocab_size // tp_size)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_proj.weight": (hidden, q // tp_size),
        "self_attention.linear_qkv.weight": (qkv, hidden),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * shape.ffn_hidden_size // tp_size, hidden),
        "mlp.linear_fc2.weight": (hidden, shape.ffn_hidden_size // tp_size),
    }
    if shape.family.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (qkv,)
    if shape.family.qk_norm:
        layer["self_attention.q_layernorm.weight"] = layer["self_attention.k_layernorm.weight"] = (shape.head_dim,)
    if fused_norms:
        layer = {FUSED_NORMS.get(name, name): dims for name, dims in layer.items()}
    found: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab, hidden)}
    for number in range(shape.num_layers):
        found |= {f"decoder.layers.{number}.{name}": dims for name, dims in layer.items()}
    found["decoder.final_layernorm.weight"] = (hidden,)
    if not shape.tied:
        found["output_layer.weight"] = (vocab, hidden)
    return found
