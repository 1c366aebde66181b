"""Weights packed for other processes: what is refused, and what arrives."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dapo.rollout.weight_buckets import ModelWeights, SharedBuckets
from tests.functional.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen2", tied=True, layers=2)
    return path


def tensors(model: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())


@pytest.mark.parametrize("bucket_bytes", [1, 5000, 1 << 30])
@pytest.mark.parametrize("readers", [1, 2])
def test_every_reader_gets_every_tensor_in_buckets_of_at_most_the_size(
    model: Path, bucket_bytes: int, readers: int
) -> None:
    weights, sent = ModelWeights(model), tensors(model)
    arrived: list[dict[str, Tensor]] = [{} for _ in range(readers)]
    sizes = []
    for bucket in SharedBuckets(weights, torch.bfloat16, bucket_bytes, readers).pack(sent.items()):
        assert len(bucket) == readers
        views = [dict(pickle.loads(pickled)) for pickled in bucket]
        for reader, found in zip(arrived, views, strict=True):
            reader.update({name: view.clone() for name, view in found.items()})
        sizes.append(sum(view.nbytes for view in views[0].values()))
    largest = max(tensor.numel() * 2 for tensor in sent.values())
    assert max(sizes) <= max(bucket_bytes, largest)
    assert (len(sizes) == 1) == (bucket_bytes == 1 << 30)
    for reader in arrived:
        assert reader.keys() == sent.keys()
        assert all(torch.equal(reader[name], tensor.bfloat16()) for name, tensor in sent.items())


def test_a_tied_weight_may_come_and_is_left_out(model: Path) -> None:
    sent = tensors(model)
    both = {**sent, "lm_head.weight": sent["model.embed_tokens.weight"]}
    assert [name for name, _ in ModelWeights(model).checked(both.items(), 1)] == [*sent]
