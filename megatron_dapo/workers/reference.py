"""What a rank of a reference with ranks of its own does: log-probs under the weights that training began with."""

from __future__ import annotations

from transformers import AutoConfig

from megatron_dapo.mcore.families import shape_of
from megatron_dapo.mcore.model import build_model
from megatron_dapo.mcore.optimizer import wrap_precision
from megatron_dapo.mcore.parallel import RankLayout, initialize
from megatron_dapo.mcore.schedule import Model, TokenStats, log_probs
from megatron_dapo.mcore.weights import load_hf
from megatron_dapo.types import SequenceBatch
from megatron_dapo.workers.policy import PolicySettings


class ReferenceWorker:
    """The policy's model and layout without gradients and optimizer; its data-parallel size is its group's own."""

    def __init__(self, settings: PolicySettings):
        self.layout = initialize(settings.megatron, settings.seed)
        shape = shape_of(AutoConfig.from_pretrained(settings.model_path))
        chunks = build_model(shape, settings.megatron)
        load_hf(chunks, shape, settings.model_path)
        self._model = Model(wrap_precision(chunks), settings.objective, settings.packed, chunks[0].config)

    def rank_layout(self, _: None) -> RankLayout:
        return self.layout

    def log_probs(self, micro_batches: tuple[SequenceBatch, ...]) -> list[TokenStats]:
        """As `PolicyWorker.log_probs`."""
        found = log_probs(self._model, micro_batches).tokens
        return found if self.layout.reports else []
