"""The output layer that goes from hidden states to the DAPO loss.

It stands in `GPTModel.output_layer`, so that `GPTModel.forward` stays Megatron's own and DDP's parameter-gather hooks
fire for it as for any layer. Instead of logits it returns a [1, 1] loss; what else it found is in `result`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from megatron_dapo.mcore.batch import HeadInputs
from megatron_dapo.mcore.fused_loss import SUMS, HeadResult, Objective, Vocabulary, dapo_loss, token_logp


class DapoHead(ColumnParallelLinear):
    """Set `inputs` and `objective` before each forward pass of the model; read `result` after it."""

    vocabulary: Vocabulary
    inputs: HeadInputs
    objective: Objective
    result: HeadResult

    @staticmethod
    def install(layer: ColumnParallelLinear, vocab_size: int) -> DapoHead:
        """Turn a model's output layer into a head, keeping its parameters and all that points to them."""
        layer.__class__ = DapoHead
        head = cast(DapoHead, layer)
        head.vocabulary = Vocabulary(vocab_size, cast(dist.ProcessGroup, layer.tp_group))
        return head

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        """hidden [t(/tp under SP), b, h] -> ([1, 1] loss, no bias)."""
        weight = cast(torch.Tensor, self.weight) if weight is None else weight
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        inputs = self.inputs
        chosen = hidden.flatten(0, 1)[inputs.positions]
        if inputs.terms is not None:
            self.result = dapo_loss(chosen, weight, inputs.targets, inputs.terms, self.objective, self.vocabulary)
        else:
            logp, entropy = token_logp(chosen, weight, inputs.targets, self.objective.temperature, self.vocabulary)
            nothing = torch.zeros(len(SUMS), dtype=torch.float64, device=hidden.device)
            self.result = HeadResult(nothing[0].float(), nothing, logp, entropy)
        return self.result.loss.view(1, 1), None
