"""What is exported is an ordinary Hugging Face checkpoint, whole or in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_dapo.mcore.hf_read import read_hf
from megatron_dapo.mcore.hf_save import save_hf

Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=[("qwen2", False), ("qwen3", True)], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, checkpoint_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A whole checkpoint: weights, config, tokenizer, generation config."""
    path = shutil.copytree(checkpoint_of(*request.param), tmp_path / "source")
    model = Tokenizer(WordLevel({"<end>": 0, "yes": 1, "no": 2}, unk_token="no"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<end>", chat_template="{{ messages[0]['content'] }}"
    ).save_pretrained(path)
    transformers.GenerationConfig(eos_token_id=[0, 5], max_new_tokens=7).save_pretrained(path)
    return path


@pytest.fixture
def tensors(source: Path) -> Tensors:
    """Weights that training has changed."""
    return {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}


def save(tensors: Tensors, source: Path, path: Path, dtype: torch.dtype = torch.float32, **more: int | bool) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    save_hf(iter(tensors.items()), shapes, dtype, str(source), path, **{"writes": True, **more})


def weights(model: torch.nn.Module) -> Tensors:
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_loads_the_exported_weights(source: Path, tensors: Tensors, tmp_path: Path, shard_bytes: int):
    save(tensors, source, tmp_path / "out", shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    found = weights(model)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_config_tokenizer_and_generation_config_come_along(source: Path, tensors: Tensors, tmp_path: Path):
    save(tensors, source, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [0, 5]
    before, after = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (source, tmp_path / "out"))
    assert {key for key in before if before[key] != after[key]} <= {"dtype", "_name_or_path"}


def test_a_checkpoint_without_a_generation_config_is_exported_without_one(
    source: Path, tensors: Tensors, tmp_path: Path
):
    (source / "generation_config.json").unlink()
    save(tensors, source, tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_the_index_names_every_tensor_and_the_bytes_of_all(source: Path, tensors: Tensors, tmp_path: Path):
    out, limit = tmp_path / "out", 20_000
    save(tensors, source, out, shard_bytes=limit)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    held = {name: file for file in files for name in load_file(out / file)}
    assert index["weight_map"] == held
    assert list(index["weight_map"]) == list(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(out / file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1


def test_a_shard_is_filled_to_its_limit_and_no_further(source: Path, tmp_path: Path):
    tensors = {name: torch.zeros(size) for name, size in [("a", 2), ("b", 3), ("c", 9), ("d", 1), ("e", 4)]}
    save(tensors, source, tmp_path / "out", shard_bytes=20)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert [file[6:11] for file in index["weight_map"].values()] == ["00001", "00001", "00002", "00003", "00003"]


def test_weights_are_written_in_the_type_asked_for(source: Path, tensors: Tensors, tmp_path: Path):
    save(tensors, source, tmp_path / "out", torch.bfloat16, shard_bytes=10_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(weights(model)[name], tensor.bfloat16()) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors.values())


def test_a_rank_that_does_not_write_still_takes_every_tensor(source: Path, tensors: Tensors, tmp_path: Path):
    taken = iter(tensors.items())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    save_hf(taken, shapes, torch.float32, str(source), tmp_path / "out", writes=False)
    assert next(taken, None) is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", [10_000, 10**9])
def test_a_second_export_replaces_the_first(source: Path, tensors: Tensors, tmp_path: Path, first: int):
    save(tensors, source, tmp_path / "out", shard_bytes=first)
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    save(newer, source, tmp_path / "out", shard_bytes=10**9 + 10_000 - first)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(weights(model)[name], tensor) for name, tensor in newer.items())
    assert all(torch.equal(tensor, newer[name]) for name, tensor in read_hf(tmp_path / "out"))


def test_what_this_version_of_transformers_would_change_or_drop_comes_along(
    source: Path, tensors: Tensors, tmp_path: Path
):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"a_key_of_a_later_version": [1]}))
    save(tensors, source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    save(tensors, source, tmp_path / "rounded", torch.bfloat16)
    changed = json.loads((tmp_path / "rounded" / "config.json").read_text())
    assert changed == config | {"a_key_of_a_later_version": [1], "dtype": "bfloat16"}
