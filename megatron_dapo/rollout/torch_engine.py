"""The embedded rollout engine: plain torch on the modules of a transformers model, in the trainer's own process.

For tiny models, CPUs and tests; it has no paged memory, no continuous batching and no tensor parallelism.

What is drawn depends on the request and the weights alone. Requests of one `submit` call are decoded in chunks of
`max_num_seqs` in submission order, never with another call's, so the same calls give the same bits whenever `poll`
is called. In another chunk a request meets other matrix shapes: its log-probs may differ in the last bits, and a
token only where such a difference tips its draw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from megatron_dapo.algo.checksum import checksum
from megatron_dapo.rollout.chunk import Chunk
from megatron_dapo.rollout.decoder import Decoder, build_model
from megatron_dapo.rollout.engine import Tag
from megatron_dapo.rollout.failures import WeightsNotLoadedError
from megatron_dapo.rollout.request_check import RequestCheck
from megatron_dapo.types import Completion, Request

_STEPS_PER_POLL = 8


class TorchEngine:
    """A `RolloutEngine`. Equal prompts of a chunk are computed once, rows leave the batch as they finish.

    Log-probs are those of the distribution drawn from: temperature, top-k and top-p included. Greedy responses
    (temperature 0) carry those of the plain softmax at temperature 1.
    """

    def __init__(
        self,
        model_path_or_config: str | Path | PreTrainedConfig,
        eos_token_ids: Sequence[int],
        *,
        max_num_seqs: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        """Of a checkpoint's folder only the config is read; weights come through `load_weights`.

        Raises:
            ValueError: a model that the engine does not run, max_num_seqs < 1, or an eos id outside the vocabulary.
        """
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {max_num_seqs}; at least 1 sequence must be decoded at once")
        self._device = torch.device(device)
        self._model = build_model(model_path_or_config, self._device, dtype)
        self._decoder = Decoder(self._model)
        self._check = RequestCheck(self._model.config, eos_token_ids)
        self._eos = np.array(sorted(eos_token_ids), np.int64)
        self._max_num_seqs = max_num_seqs
        self._version: int | None = None  # None: there are no weights to generate with
        self._queue: deque[tuple[int, Sequence[Request]]] = deque()  # chunks to come, and their weight version
        self._chunk: Chunk | None = None
        self._pending: set[tuple[int, int]] = set()
        self._paused = False

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned by `poll`."""
        return len(self._pending)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all of them or, where one is refused, none.

        Raises:
            WeightsNotLoadedError: no weights were loaded, or the last load failed.
            ValueError: an empty prompt, one with ids outside the vocabulary or with max_tokens beyond the model's
                positions, sampling parameters that cannot be, or a (draw_index, sample_index) that is pending.
        """
        if self._version is None:
            raise WeightsNotLoadedError("no weights to generate with: call load_weights with the whole model first")
        self._check.all(requests, self._pending)
        self._pending |= {(request.draw_index, request.sample_index) for request in requests}
        for start in range(0, len(requests), self._max_num_seqs):
            self._queue.append((self._version, tuple(requests[start : start + self._max_num_seqs])))

    @torch.inference_mode()
    def poll(self) -> list[Completion]:
        """Decode until a response ends, a few tokens at most; what finished, in submission order.

        Raises:
            FloatingPointError: the model's logits are not finite. The requests stay pending until `abort`.
        """
        if self._paused:
            return []
        if self._chunk is None:
            if not self._queue:
                return []
            version, requests = self._queue[0]
            self._chunk = Chunk(requests, self._decoder, self._eos, self._device, version)
            self._queue.popleft()
        finished: list[Completion] = []
        for _ in range(_STEPS_PER_POLL):
            finished = self._chunk.step()
            if finished:
                break
        if not self._chunk.alive:
            self._chunk = None
        self._pending -= {(c.draw_index, c.sample_index) for c in finished}
        return finished

    def abort(self) -> None:
        """Drop all pending requests and what they had written."""
        self._queue.clear()
        self._pending.clear()
        self._chunk = None

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy every weight in place, converted to the engine's dtype; completions carry `version` from here on.

        The output projection of a model with tied embeddings may be left out; where it comes its shape is checked
        and its values are not used. After an error the engine generates nothing until a load succeeds.

        Raises:
            RuntimeError: requests are pending; a response is written by one set of weights.
            ValueError: a name or shape that the model does not have, a name that came twice or never.
        """
        if self._pending:
            raise RuntimeError(
                f"load_weights(version={version}) while {self.pending} requests are pending: "
                "poll until none is, or abort them"
            )
        self._version = None
        own = dict(self._model.named_parameters())
        tied = {name: t for name, t in self._model.state_dict().items() if name not in own}
        came: set[str] = set()
        for name, tensor in tensors:
            target = own.get(name, tied.get(name))
            if target is None:
                near = get_close_matches(name, [*own, *tied], n=1)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise ValueError(f"weight {name!r} is not in the model{hint}. Weights come by Hugging Face names")
            if name in came:
                raise ValueError(f"weight {name!r} came twice in version {version}; send each name once")
            if tensor.shape != target.shape:
                raise ValueError(f"weight {name!r} has shape {list(tensor.shape)}; the model has {list(target.shape)}")
            came.add(name)
            if name in own:
                target.copy_(tensor.detach())
        missing = [name for name in own if name not in came]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{len(missing)} of {len(own)} weights never came in version {version}: {listed}")
        self._version = version

    def weight_checksums(self) -> dict[str, int]:
        return {name: checksum(param) for name, param in self._model.named_parameters()}

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def sleep(self, tags: Sequence[Tag]) -> None:
        """Nothing to give up: the cache is gone when a chunk is through, and the weights are a tiny model's.

        Raises:
            RuntimeError: requests are pending.
        """
        if self._pending:
            raise RuntimeError(f"sleep while {self.pending} requests are pending: poll until none is, or abort them")
        if "weights" in tags:
            self._version = None

    def wake(self, tags: Sequence[Tag]) -> None:
        """Nothing to take back."""

    def restart(self) -> None:
        self.abort()
        self._paused, self._version = False, None

    def close(self) -> None:
        """There is no process to end."""
