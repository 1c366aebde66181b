"""Seconds of log-prob passes and updates: products and attention by their operations, and what goes between GPUs.

Nothing overlaps but what the configuration says overlaps. Operations of a dense decoder as in arXiv 2104.04473,
appendix; a backward pass costs two forward ones, recomputation one more. Symbols: a micro-batch has `tokens` in all and
`squares`, the sum of the squares of its sequences' lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dapo.config.tree import RunConfig
from megatron_dapo.data.packing import plan_micro_batches
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.plan.hardware import Cluster
from megatron_dapo.plan.memory import Held, item_size

_GATHERS = 4  # of hidden states a layer and pass under tensor parallelism: two all-reduces, or as many bytes
_ADAM_BYTES = 30  # an element: gradient, master weight and moments read; these and the weight written


@dataclass(frozen=True)
class PassTime:
    """Of a sequence of micro-batches through the pipeline, on the slowest data-parallel rank."""

    seconds: float
    micro_batches: int  # a rank
    bubble: float  # share of the time in which a stage waits for the pipeline to fill and drain


@dataclass(frozen=True)
class TrainingTime:
    log_probs: float
    update: float  # all of a step's
    update_pass: PassTime  # means over the step's updates
    gradient_sync: float  # of them: reduction of gradients and gather of weights
    optimizer: float


class Packer:
    """Packs as the trainer does, each question once: layouts differ in little that packing sees."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], tuple[np.ndarray, np.ndarray]] = {}

    def pack(
        self, lengths: np.ndarray, dp_size: int, max_tokens: int, multiple_of: int, quadratic: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """[data-parallel rank, micro-batch]: tokens, and the sum of the squares of the sequences' lengths."""
        key = (lengths.tobytes(), dp_size, max_tokens, multiple_of, quadratic)
        if key not in self._found:
            plan = plan_micro_batches(
                lengths, dp_size, max_tokens=max_tokens, multiple_of=multiple_of, quadratic=quadratic
            )
            held = [[lengths[list(indices)].astype(np.float64) for indices in rank] for rank in plan]
            tokens = np.array([[part.sum() for part in rank] for rank in held])
            squares = np.array([[(part**2).sum() for part in rank] for rank in held])
            self._found[key] = tokens, squares
        return self._found[key]


class TrainingModel:
    """Times of one layout."""

    def __init__(self, config: RunConfig, shape: ModelShape, cluster: Cluster, world_size: int, packer: Packer):
        self.config, self.shape, self.cluster, self.packer = config, shape, cluster, packer
        self.megatron = config.actor_rollout_ref.actor.megatron
        self.tp = self.megatron.tensor_model_parallel_size
        self.cp = self.megatron.context_parallel_size
        self.pp = self.megatron.pipeline_model_parallel_size
        self.dp = world_size // self.megatron.model_parallel_size
        self.item = item_size(config)

    def step(self, lengths: np.ndarray, prompt: int, held: Held) -> TrainingTime:
        """`lengths` [S]: responses of a step in accepted order, group by group; `held` by the fullest stage."""
        actor = self.config.actor_rollout_ref.actor
        rollout = self.config.actor_rollout_ref.rollout
        whole = lengths + prompt
        mini = actor.ppo_mini_batch_size * rollout.n
        parts = [whole[start : start + mini] for start in range(0, len(whole), mini)]
        limit = actor.ppo_max_token_len_per_gpu
        first = {"recompute": 0, "rollout": len(whole), "first_minibatch_free": mini}[actor.old_log_prob]
        log_probs = self.passes(whole[first:], rollout.log_prob_max_token_len_per_gpu or limit, False).seconds
        updates = [self.passes(part, limit, True) for part in parts]
        seconds = sum(update.seconds for update in updates)
        sync, adam = self._gradient_sync(held, seconds / len(updates)), self._adam(held)
        count = len(updates) * actor.ppo_epochs
        mean = PassTime(
            seconds / len(updates),
            round(np.mean([update.micro_batches for update in updates])),
            float(np.mean([update.bubble for update in updates])),
        )
        return TrainingTime(
            log_probs=log_probs,
            update=seconds * actor.ppo_epochs + count * (sync + adam),
            update_pass=mean,
            gradient_sync=count * sync,
            optimizer=count * adam,
        )

    def reference(self, lengths: np.ndarray, prompt: int) -> float:
        """Seconds of the frozen reference's pass over the same."""
        section = self.config.actor_rollout_ref
        limit = section.ref.log_prob_max_token_len_per_gpu or section.actor.ppo_max_token_len_per_gpu
        return self.passes(lengths + prompt, limit, False).seconds

    def passes(self, lengths: np.ndarray, limit: int, with_backward: bool) -> PassTime:
        """Packed as the trainer packs them, then 1F1B: a rank's micro-batches, and the pipeline filled and drained."""
        if not len(lengths):
            return PassTime(0.0, 0, 0.0)
        virtual = self.megatron.virtual_pipeline_model_parallel_size
        most, multiple = max(limit * self.cp, int(lengths.max())), self.pp if virtual else 1
        tokens, squares = self.packer.pack(lengths, self.dp, most, multiple, 1 / (12 * self.shape.hidden_size))
        times = self.micro_batches(tokens, squares, with_backward)
        fill = (self.pp - 1) / (virtual or 1) * times.max(1)
        ranks = times.sum(1) + fill
        slowest = int(ranks.argmax())
        return PassTime(float(ranks[slowest]), times.shape[1], float(fill[slowest] / ranks[slowest]))

    def micro_batches(self, tokens: np.ndarray, squares: np.ndarray, with_backward: bool) -> np.ndarray:
        """Seconds of each micro-batch on the last stage, which has the head; 0 for an empty one."""
        shape, assumed, card = self.shape, self.cluster.assumptions, self.cluster.card
        peak = card.bf16_flops * (1 if self.item == 2 else 0.5) * self.tp * self.cp
        width = shape.num_heads * shape.head_dim
        products = 2 * tokens * self._layer_elements() / (peak * assumed.matmul_efficiency)
        attention = 2 * squares * width / (peak * assumed.attention_efficiency)
        between = self._tensor_parallel(tokens) + self._context_parallel(tokens)
        forward = np.maximum(products + attention, assumed.layer_floor_s) + between
        head = 2 * tokens * shape.vocab_size * shape.hidden_size / (peak * assumed.matmul_efficiency)
        layers = shape.num_layers / self.pp
        sent = self._to_next_stage(tokens)
        if not with_backward:
            return np.where(tokens, layers * forward + head + sent, 0.0)
        again = {"full": forward, "selective": attention, None: 0.0}[self.megatron.recompute_granularity]
        if self.megatron.recompute_method == "block":
            again = again * min(1.0, (self.megatron.recompute_num_layers or 0) / layers)
        return np.where(tokens, layers * (3 * forward + again) + 3 * head + 2 * sent, 0.0)

    def _layer_elements(self) -> float:
        shape = self.shape
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        return shape.hidden_size * (2 * q + 2 * kv + 3 * shape.ffn_hidden_size)

    def _tensor_parallel(self, tokens: np.ndarray) -> np.ndarray | float:
        if self.tp == 1:
            return 0.0
        moved = _GATHERS * tokens / self.cp * self.shape.hidden_size * self.item * (self.tp - 1) / self.tp
        return moved / self.cluster.link(self.tp)

    def _context_parallel(self, tokens: np.ndarray) -> np.ndarray | float:
        """Keys and values of all ranks pass by."""
        if self.cp == 1:
            return 0.0
        width = 2 * self.shape.num_kv_heads * self.shape.head_dim / self.tp
        return tokens * width * self.item * (self.cp - 1) / self.cp / self.cluster.link(self.tp * self.cp)

    def _to_next_stage(self, tokens: np.ndarray) -> np.ndarray | float:
        if self.pp == 1:
            return 0.0
        share = self.tp if self.megatron.sequence_parallel else 1
        moved = tokens / self.cp * self.shape.hidden_size * self.item / share
        return moved * (self.megatron.virtual_pipeline_model_parallel_size or 1) / self.cluster.link(10**6)

    def _gradient_sync(self, held: Held, update_s: float) -> float:
        """Of one update. What overlaps a backward pass costs what is longer than that."""
        ranks = self.dp * self.cp
        if ranks == 1:
            return 0.0
        link = self.cluster.link(self.tp * ranks) / ((ranks - 1) / ranks)
        if not self.megatron.use_distributed_optimizer:
            return 2 * held.gradients / link
        reduced, gathered = held.gradients / link, held.weights / link
        if self.megatron.overlap_grad_reduce:
            reduced = max(0.0, reduced - update_s * 2 / 3)
        if self.megatron.overlap_param_gather:
            gathered = max(0.0, gathered - update_s / 3)
        return reduced + gathered

    def _adam(self, held: Held) -> float:
        elements = held.optimizer / 12
        if not self.megatron.optimizer_cpu_offload:
            return elements * _ADAM_BYTES / self.cluster.card.hbm
        assumed = self.cluster.assumptions
        at_host = elements * _ADAM_BYTES / (assumed.host_memory / self.cluster.gpus_per_node)
        return at_host + 6 * elements / assumed.pcie  # gradients there, weights back
