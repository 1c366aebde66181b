"""Weights on their way to another process of the host: checked against the model, packed into one shared buffer.

The buffer is one storage of torch's `file_system` kind, used for every bucket of a push and given back at its end, so
that nothing of it is left in /dev/shm between pushes. What travels is a pickle that names it and the places in it. The
receiver has to be through with a bucket before the next one is packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.multiprocessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

ALIGNMENT = 64  # bytes


class ModelWeights:
    """The names and shapes of a checkpoint's weights, Hugging Face's. `tied`: names that share another's tensor."""

    def __init__(self, model_path: str | Path):
        config = AutoConfig.from_pretrained(model_path)
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.shapes: Mapping[str, torch.Size] = {name: p.shape for name, p in model.named_parameters()}
        self.tied = {name: t.shape for name, t in model.state_dict().items() if name not in self.shapes}

    def checked(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they come, without those that are tied.

        Raises:
            ValueError: a name or shape that the model does not have, a name that came twice, or, at the end, never.
        """
        came: set[str] = set()
        for name, tensor in tensors:
            shape = self.shapes.get(name, self.tied.get(name))
            if shape is None:
                near = get_close_matches(name, [*self.shapes, *self.tied], n=1)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise ValueError(f"weight {name!r} is not in the model{hint}. Weights come by Hugging Face names")
            if name in came:
                raise ValueError(f"weight {name!r} came twice in version {version}; send each name once")
            if tensor.shape != shape:
                raise ValueError(f"weight {name!r} has shape {list(tensor.shape)}; the model has {list(shape)}")
            came.add(name)
            if name in self.shapes:
                yield name, tensor
        missing = [name for name in self.shapes if name not in came]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{len(missing)} of {len(self.shapes)} weights never came in version {version}: {listed}")


class SharedBuckets:
    def __init__(self, weights: ModelWeights, dtype: torch.dtype, bucket_bytes: int, readers: int):
        """
        Args:
            dtype: that the receiver holds weights in.
            bucket_bytes: of a bucket; a larger tensor makes a larger buffer.
            readers: processes that unpickle each bucket.
        """
        sizes = [_aligned(shape.numel() * dtype.itemsize) for shape in weights.shapes.values()]
        self._size = max(min(bucket_bytes, sum(sizes)), *sizes)
        self._dtype, self._readers = dtype, readers

    def pack(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[bytes]]:
        """Buckets, at least one if there is a tensor: [(name, view of the buffer), ...], pickled once for each reader.

        torch counts a reference to the memory for each pickle, and takes one off for each unpickling.
        """
        buffer = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_using_filename_cpu(self._size))
        bucket: list[tuple[str, Tensor]] = []
        used = 0
        for name, tensor in tensors:
            size = tensor.numel() * self._dtype.itemsize
            if bucket and used + size > self._size:
                yield [pickled(bucket) for _ in range(self._readers)]
                bucket, used = [], 0
            view = buffer[used : used + size].view(self._dtype).view(tensor.shape)
            view.copy_(tensor.detach())
            bucket.append((name, view))
            used += _aligned(size)
        if bucket:
            yield [pickled(bucket) for _ in range(self._readers)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def pickled(bucket: list[tuple[str, Tensor]]) -> bytes:
    """Tensors by the names of their storages, which are moved into shared memory.

    torch's other way hands over file descriptors, which only a process that the sender itself started can take.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        return bytes(ForkingPickler.dumps(bucket))
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
