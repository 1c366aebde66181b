"""The output layer that goes from hidden states to the DAPO loss.

It stands in `GPTModel.output_layer`, so that `GPTModel.forward` stays Megatron's own and DDP's parameter-gather hooks
fire for it as for any layer. Instead of logits it returns a [1, 1] loss; what else it found is in `result`.

Only positions that predict a response token are computed. Under sequence parallelism each rank holds other positions,
and unequally many that count: hidden states are gathered whole and selected after that, so that all ranks of the
tensor-parallel group compute the same tokens. That takes [t·b, h] in the model's type for the gathered ones, freed
after the selection, and [n, h] for the chosen ones; on the way back the same for their gradients.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from megatron_dapo.mcore.batch import HeadInputs
from megatron_dapo.mcore.fused_loss import (
    LOGITS_BYTES,
    SUMS,
    HeadResult,
    MainGrad,
    Objective,
    Vocabulary,
    dapo_loss,
    token_logp,
)


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
        logits_bytes = LOGITS_BYTES["cuda" if torch.cuda.is_available() else "cpu"]
        head.vocabulary = Vocabulary(vocab_size, cast(dist.ProcessGroup, layer.tp_group), logits_bytes)
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
        inputs, objective = self.inputs, self.objective
        chosen = hidden.flatten(0, 1)[inputs.positions]
        if inputs.terms is not None:
            self.result = dapo_loss(
                chosen,
                weight,
                inputs.targets,
                inputs.terms,
                objective,
                self.vocabulary,
                context=cast(dist.ProcessGroup, parallel_state.get_context_parallel_group()),
                main_grad=_main_grad(weight),
            )
        else:
            logp, entropy = token_logp(chosen, weight, inputs.targets, objective.temperature, self.vocabulary)
            nothing = torch.zeros(len(SUMS), dtype=torch.float64, device=hidden.device)
            self.result = HeadResult(nothing[0].float(), nothing, logp, entropy)
        return self.result.loss.view(1, 1), None


def _main_grad(weight: torch.Tensor) -> MainGrad | None:
    """Where DDP sums the weight's gradient, DDP being told that it need not add this pass's; None without DDP.

    The mark is DDP's own, taken back whenever gradients are zeroed. A weight that is the embedding's too has
    `zero_out_wgrad`: DDP then adds what autograd brings in spite of the mark.
    """
    if not torch.is_grad_enabled() or not hasattr(weight, "main_grad"):
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return MainGrad(cast(Any, weight).main_grad, shared=hasattr(weight, "zero_out_wgrad"))
