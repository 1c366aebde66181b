"""The logits of a checkpoint on a probe prompt, computed by Megatron and by transformers: what a conversion must keep.

Both compute in fp32, whatever the weights are stored in, so that they can be compared closely. Megatron runs the
trainer's own forward pass, in this process alone; either side needs 4 bytes a parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.model import build_model
from megatron_dapo.mcore.model_load import load_model
from megatron_dapo.mcore.parallel import initialize, shutdown
from megatron_dapo.mcore.schedule import Model, log_probs
from megatron_dapo.types import SequenceBatch

_OBJECTIVE = Objective(PolicyLossConfig(0.2, 0.28, 10.0), temperature=1.0)  # no loss is asked for


def megatron_logits(
    folder: Path, shape: ModelShape, token_ids: list[int], rounded_to: torch.dtype | None
) -> torch.Tensor:
    """[T, V] logits of the `torch_dist` checkpoint in `folder`, its weights rounded to `rounded_to` (None: not)."""
    initialize(MegatronConfig(), seed=0)
    try:
        chunks = build_model(shape, MegatronConfig())
        load_model(chunks, shape, folder)
        (chunk,) = chunks
        for param in chunk.parameters() if rounded_to is not None else ():
            param.data.copy_(param.data.to(rounded_to))
        seen: list[torch.Tensor] = []

        def look(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            weight = layer.weight if kwargs.get("weight") is None else kwargs["weight"]
            seen.append(args[0][:, 0] @ weight[: shape.vocab_size].T)

        chunk.output_layer.register_forward_pre_hook(look, with_kwargs=True)
        ids = np.asarray([*token_ids, 0], np.int64)  # one more: the last token of a sequence is not computed
        batch = SequenceBatch(token_ids=ids, lengths=np.array([len(ids)]), prompt_lengths=np.array([1]))
        log_probs(Model(chunks, _OBJECTIVE, packed=True, config=chunk.config), [batch])
        return seen[0].float().cpu()
    finally:
        shutdown()


def hf_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """[T, V] logits of the Hugging Face checkpoint in `folder`."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    with torch.no_grad():
        return model.eval()(torch.tensor([token_ids])).logits[0].float()
