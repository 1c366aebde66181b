from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_dapo.plan.hardware import Cluster
from megatron_dapo.plan.memory import Held
from megatron_dapo.plan.training_time import Packer, TrainingModel
from tests.unit.mcore.helpers import QWEN_32B
from tests.unit.plan.helpers import cluster_of, run_32b

HELD = Held(weights=4e9, gradients=8e9, optimizer=3e9, largest=1e8)


def ideal() -> Cluster:
    """Every operation at the card's peak, nothing sent."""
    cluster = cluster_of(assume=("matmul_efficiency=1", "attention_efficiency=1", "layer_floor_s=0"))
    return replace(cluster, card=replace(cluster.card, nvlink=1e30, network=1e30))


def model(cluster: Cluster | None = None, **changes: object) -> TrainingModel:
    return TrainingModel(run_32b(**changes), QWEN_32B, cluster or ideal(), 128, Packer())


def one(length: float) -> tuple[np.ndarray, np.ndarray]:
    return np.array([[length]]), np.array([[length**2]])


def test_a_pass_at_the_peak_is_two_operations_a_parameter_and_token_and_those_of_attention() -> None:
    layers = 32  # of one of two stages
    products = 2 * 1000 * (5120 * (2 * 5120 + 2 * 1024 + 3 * 27648) * layers + 152064 * 5120)
    attention = 2 * 1000**2 * 5120 * layers
    seconds = model().micro_batches(*one(1000), with_backward=False)
    assert seconds == pytest.approx((products + attention) / (8 * 989.4e12))


def test_a_backward_pass_costs_two_and_recomputation_one_more() -> None:
    plain = {f"actor__megatron__recompute_{part}": None for part in ("granularity", "method", "num_layers")}
    once = model(**plain).micro_batches(*one(1000), with_backward=False)
    assert model(**plain).micro_batches(*one(1000), with_backward=True) == pytest.approx(3 * once)
    head = 2 * 1000 * 152064 * 5120 / (8 * 989.4e12)
    assert model().micro_batches(*one(1000), with_backward=True) == pytest.approx(4 * once - head)


def test_tensor_parallelism_sends_four_times_the_hidden_states_a_layer_and_pass() -> None:
    slow = replace(ideal(), card=replace(ideal().card, nvlink=1e9))
    sent = 4 * 1000 * 5120 * 2 * 7 / 8 / (1e9 * 0.7)
    difference = model(slow).micro_batches(*one(1000), False) - model().micro_batches(*one(1000), False)
    assert difference == pytest.approx(32 * sent)


def test_context_parallelism_divides_the_work() -> None:
    once = model(actor__megatron__tensor_model_parallel_size=2).micro_batches(*one(8000), False)
    halves = model(
        actor__megatron__tensor_model_parallel_size=2, actor__megatron__context_parallel_size=2
    ).micro_batches(*one(8000), False)
    assert halves == pytest.approx(once / 2)


def test_a_pipeline_waits_for_its_stages_to_fill() -> None:
    deep = model(actor__megatron__pipeline_model_parallel_size=4)
    found = deep.passes(np.full(4 * 10, 22528), 22528, with_backward=False)  # ten micro-batches a rank
    assert found.micro_batches == 10
    assert found.bubble == pytest.approx(3 / 13)
    virtual = model(
        actor__megatron__pipeline_model_parallel_size=4, actor__megatron__virtual_pipeline_model_parallel_size=2
    ).passes(np.full(4 * 12, 22528), 22528, with_backward=False)
    assert virtual.bubble == pytest.approx(1.5 / 13.5)


def test_log_probs_are_computed_for_as_many_as_the_setting_asks() -> None:
    lengths = np.full(8192, 3000)

    def seconds(old: str) -> float:
        return model(actor__old_log_prob=old).step(lengths, 200, HELD).log_probs

    assert seconds("rollout") == 0
    assert seconds("first_minibatch_free") == pytest.approx(seconds("recompute") * 15 / 16, rel=0.03)


def test_gradients_are_reduced_and_weights_gathered_once_an_update() -> None:
    slow = replace(ideal(), card=replace(ideal().card, network=1e9))
    found = model(slow).step(np.full(8192, 3000), 200, HELD)
    assert found.gradient_sync == pytest.approx(16 * (8e9 + 4e9) * 7 / 8 / 0.7e9)
    hidden = {"actor__megatron__overlap_grad_reduce": True, "actor__megatron__overlap_param_gather": True}
    assert model(**hidden).step(np.full(8192, 3000), 200, HELD).gradient_sync == 0


def test_the_slowest_rank_is_waited_for() -> None:
    lengths = np.arange(1008, 999, -1)  # nine over eight ranks: the last rank gets the two shortest
    once = model().micro_batches(np.array([[2001]]), np.array([[1001**2 + 1000**2]]), with_backward=False)
    found = model().passes(lengths, 22528, with_backward=False)
    assert found.seconds == pytest.approx(2 * float(once[0, 0]))  # two stages: one to fill
