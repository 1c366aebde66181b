"""Inside vLLM's worker process: weights out of shared memory into the model, and checksums of what it computes with.

vLLM makes `WeightsExtension` a base of its worker (`--worker-extension-cls`); `/collective_rpc` calls its methods by
name. Without CUDA vLLM packs a matrix for its kernels and throws the plain one away. `load_weights` of the model then
has nowhere to write to; vLLM's layer-wise reload makes the plain tensors again, fills and packs them.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dapo.rollout.held_tensors import EngineRank, rank_checksums

EXTENSION = f"{__name__}.WeightsExtension"
ROWS_AT_ONCE = 256  # of the identity that a packed matrix is multiplied with


class WeightsExtension:
    """Of one worker. Between `begin_policy_update` and `end_policy_update` the model computes nothing."""

    model_runner: Any  # vLLM's, of the worker
    model_config: Any
    device: torch.device
    rank: int

    def begin_policy_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload  # pyright: ignore[reportMissingImports]

        initialize_layerwise_reload(self.model_runner.get_model())

    def take_policy_bucket(self, pickles: Sequence[str]) -> None:
        """`pickles`: of each rank's own, in base64, the same [(Hugging Face name, view of shared memory), ...].

        Copied at once: vLLM holds on to what it is given until a layer is whole, and the sender reuses the memory.
        """
        named_tensors = pickle.loads(base64.b64decode(pickles[self.rank]))
        model = self.model_runner.get_model()
        model.load_weights((name, view.to(self.device, copy=True)) for name, view in named_tensors)

    def end_policy_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload  # pyright: ignore[reportMissingImports]

        model = self.model_runner.get_model()
        finalize_layerwise_reload(model, self.model_config)
        pack_tied(model)

    def policy_checksums(self, shapes: Mapping[str, Sequence[int]], size: int, head_dim: int) -> dict[str, str]:
        """This worker's part of the checksums, as decimal numbers, by the Hugging Face names of `shapes`.

        Raises:
            KeyError: a tensor that the model does not have.
            RuntimeError: a matrix is held twice, plain and packed, and the two differ.
        """
        held = HeldParameters(self.model_runner.get_model())
        held.refuse_difference()
        return {
            name: str(part)
            for name, part in rank_checksums(held, shapes, EngineRank(self.rank, size, head_dim)).items()
        }


class HeldParameters(Mapping[str, Tensor]):
    """The parameters of a model by name; one of which only the packed form is left is unpacked when it is asked for."""

    def __init__(self, model: nn.Module):
        self._modules = dict(model.named_modules())
        # With a tied output projection: it is packed by itself.
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def __getitem__(self, name: str) -> Tensor:
        plain = self._parameters[name].detach()
        return plain if plain.numel() else unpacked(self._layer(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def refuse_difference(self) -> None:
        """Raises RuntimeError: a matrix is held twice, plain to look rows up and packed, and the two differ."""
        for name, plain in self._parameters.items():
            packed = name.endswith(".weight") and hasattr(self._layer(name), "cpu_linear")
            if packed and plain.numel() and not torch.equal(plain, unpacked(self._layer(name))):
                raise RuntimeError(f"{name} is held twice, plain and packed, and the two differ")

    def _layer(self, name: str) -> Any:
        return self._modules[name.rpartition(".")[0]]


def pack_tied(model: nn.Module) -> None:
    """Pack a tied output projection anew: vLLM 0.32 packs again what was loaded by name, and leaves this one as it was.

    It computes logits with the weights before then. Nothing to do where vLLM does not pack.
    """
    modules = dict(model.named_modules())
    once = dict(model.named_parameters()).keys()
    for name in dict(model.named_parameters(remove_duplicate=False)).keys() - once:
        layer: Any = modules[name.rpartition(".")[0]]
        if hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


@torch.no_grad()
def unpacked(layer: Any) -> Tensor:
    """The matrix that `layer` multiplies with, [out, in]: what it makes of the identity, row by row.

    Exact: each sum has one term that is not 0, times 1. Only the sign of a zero is lost.
    """
    in_features = layer.input_size_per_partition
    columns = []
    for start in range(0, in_features, ROWS_AT_ONCE):
        rows = torch.eye(min(ROWS_AT_ONCE, in_features - start), in_features, dtype=layer.weight.dtype)
        columns.append(layer.cpu_linear(rows.roll(start, 1), layer.weight, None))
    return torch.cat(columns).T
