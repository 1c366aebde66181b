"""Random models and layouts of both sides, and plain counts of what a plan should do to them."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from megatron_dapo.mcore.families import FAMILIES, ModelShape
from megatron_dapo.sync.plan import EngineRank, Topology, megatron_ranks


def model_shape(**changes: object) -> ModelShape:
    plain = {
        "family": FAMILIES["qwen2"],
        "num_layers": 2,
        "hidden_size": 6,
        "ffn_hidden_size": 8,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 2,
        "vocab_size": 11,
        "tied": False,
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling_factor": None,
        "max_positions": 64,
    }
    return ModelShape(**(plain | changes))


@dataclass(frozen=True)
class Layouts:
    shape: ModelShape
    topology: Topology


@st.composite
def layouts(draw: st.DrawFn) -> Layouts:
    """Trainer ranks on nodes of a drawn size; engines of drawn sizes on the same nodes, on others, or across both."""
    tp, pp, vpp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([None, 2]))
    vpp = vpp if pp > 1 else None
    cp, dp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    per_node = draw(st.sampled_from([1, 2, 4, 64]))
    shape = model_shape(
        family=FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))],
        num_layers=pp * (vpp or 1),
        vocab_size=draw(st.sampled_from([5, 11, 64, 130])),
        tied=draw(st.booleans()),
    )
    trainer = megatron_ranks(tp, pp, [rank // per_node for rank in range(tp * pp * cp * dp)], cp)
    engines = []
    for engine in range(draw(st.integers(1, 3))):
        size, first = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(0, 12))
        engines += [EngineRank(engine, rank, size, (first + rank) // per_node) for rank in range(size)]
    return Layouts(shape, Topology(trainer, tuple(engines), tp, pp, vpp))
