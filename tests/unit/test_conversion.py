"""What goes in comes out to the last bit; what is damaged, foreign or newer is refused, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_dapo.conversion import Conversion, hf_to_megatron, megatron_to_hf
from megatron_dapo.manifest import CHECKSUMS, META, MODEL, SIDE, find_checkpoint
from megatron_dapo.types import CheckpointError
from tests.unit.tiny_checkpoint import FAMILIES, FAMILY_NAMES, TEMPLATE, make_checkpoint, same_bits, weights_of

PLAIN, SMALL_FILES = Conversion(), Conversion(shard_bytes=20_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    hf_to_megatron(source, tmp_path / "megatron", SMALL_FILES)
    return tmp_path / "megatron"


@pytest.mark.parametrize(("bf16", "how"), [(False, PLAIN), (True, SMALL_FILES)], ids=["fp32", "bf16, small files"])
@pytest.mark.parametrize(("family", "tied"), FAMILIES, ids=FAMILY_NAMES)
def test_a_model_comes_back_to_the_last_bit(tmp_path: Path, family: str, tied: bool, bf16: bool, how: Conversion):
    source = make_checkpoint(tmp_path / "hf", family, tied, bf16=bf16)
    hf_to_megatron(source, tmp_path / "megatron", how)
    megatron_to_hf(find_checkpoint(tmp_path / "megatron"), tmp_path / "back", how)
    assert same_bits(weights_of(tmp_path / "back"), weights_of(source))
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) > 1) == (how is SMALL_FILES)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert same_bits(loaded.state_dict(), wanted.state_dict())


def test_config_tokenizer_and_chat_template_come_back_byte_for_byte(source: Path, converted: Path, tmp_path: Path):
    megatron_to_hf(find_checkpoint(converted), tmp_path / "back", PLAIN)
    side = [path.name for path in source.iterdir() if path.suffix != ".safetensors"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(side)
    assert [name for name in side if (tmp_path / "back" / name).read_bytes() != (source / name).read_bytes()] == []
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATE


def test_another_type_is_written_and_named_in_the_config(source: Path, converted: Path, tmp_path: Path):
    megatron_to_hf(find_checkpoint(converted), tmp_path / "back", PLAIN, dtype=torch.bfloat16)
    wanted = {name: tensor.bfloat16() for name, tensor in weights_of(source).items()}
    assert same_bits(weights_of(tmp_path / "back"), wanted)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen3", True), ("llama", False)])
def test_a_right_conversion_is_verified_in_both_directions(tmp_path: Path, family: str, tied: bool):
    source, how = make_checkpoint(tmp_path / "hf", family, tied), Conversion(verify=True)
    hf_to_megatron(source, tmp_path / "megatron", how)
    stored = find_checkpoint(tmp_path / "megatron")
    megatron_to_hf(stored, tmp_path / "back", how)
    megatron_to_hf(stored, tmp_path / "rounded", how, dtype=torch.bfloat16)


def test_what_fails_verification_leaves_nothing_behind(tmp_path: Path):
    source = make_checkpoint(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"verification failed: after 1 of .* probe tokens the logit"):
        hf_to_megatron(source, tmp_path / "megatron", Conversion(verify=True))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_output_that_is_there_is_not_touched(source: Path, converted: Path):
    before = sorted((path, path.stat().st_mtime_ns) for path in converted.rglob("*"))
    for convert in (hf_to_megatron, lambda *args: megatron_to_hf(find_checkpoint(converted), *args[1:])):
        with pytest.raises(CheckpointError, match="there already"):
            convert(source, converted, PLAIN)
    assert sorted((path, path.stat().st_mtime_ns) for path in converted.rglob("*")) == before


def test_what_a_killed_conversion_left_is_cleared_away(source: Path, tmp_path: Path):
    left = tmp_path / ".megatron.writing"
    left.mkdir()
    (left / "half").write_text("")
    hf_to_megatron(source, tmp_path / "megatron", PLAIN)
    assert not left.exists()
    assert not (tmp_path / "megatron" / "half").exists()


def test_progress_ends_at_the_bytes_of_the_whole(source: Path, tmp_path: Path):
    told: dict[str, list[int]] = {}

    def tell(what: str, count: int, total: int) -> None:
        told[what] = [told.get(what, [0])[0] + count, total]

    how = Conversion(progress=tell)
    hf_to_megatron(source, tmp_path / "megatron", how)
    size = sum(tensor.nbytes for tensor in weights_of(source).values())
    assert told == {"writing": [size, size]}
    told.clear()
    megatron_to_hf(find_checkpoint(tmp_path / "megatron"), tmp_path / "back", how)
    assert told["writing"] == [size, size]
    assert told["checking"][0] == told["checking"][1] > size


# What is done to a converted checkpoint -> what the error must name.
def a_flipped_bit(root: Path) -> list[str]:
    file = sorted((root / MODEL).glob("*.distcp"))[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return [str(file), "damaged", "xxh3_128"]


def a_cut_file(root: Path) -> list[str]:
    file = sorted((root / MODEL).glob("*.distcp"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    return [str(file), "bytes"]


def a_cut_file_without_checksums(root: Path) -> list[str]:
    (root / CHECKSUMS).unlink()
    return [a_cut_file(root)[0].rpartition("/")[2], "cannot be read"]


def a_missing_file(root: Path) -> list[str]:
    file = sorted((root / MODEL).glob("*.distcp"))[-1]
    file.unlink()
    return [str(file), "missing"]


def no_metadata(root: Path) -> list[str]:
    (root / CHECKSUMS).unlink()
    (root / MODEL / ".metadata").unlink()
    return [str(root / MODEL), ".metadata"]


def a_newer_format(root: Path) -> list[str]:
    meta = json.loads((root / META).read_text())
    (root / META).write_text(json.dumps(meta | {"format": 99}))
    return [str(root / META), "format", "99", "newer"]


def a_newer_backend(root: Path) -> list[str]:
    file = root / MODEL / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sharded_backend_version": 7}))
    return [str(file), "sharded_backend_version", "7"]


def another_config(root: Path, **changes: object) -> None:
    file = root / SIDE / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def more_layers(root: Path) -> list[str]:
    another_config(root, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    return ["decoder.layers.self_attention.linear_qkv", "[2, ", "[3, "]


def a_wider_model(root: Path) -> list[str]:
    another_config(root, intermediate_size=64)
    return ["decoder.layers.mlp.linear_fc1.weight", "[2, 96, 32]", "[2, 128, 32]"]


def another_family(root: Path) -> list[str]:
    another_config(root, model_type="llama")
    return ["decoder.layers.self_attention.linear_qkv.bias", "llama"]


def a_tied_config(root: Path) -> list[str]:
    another_config(root, tie_word_embeddings=True)
    return ["output_layer.weight", "tied"]


def a_larger_vocabulary(root: Path) -> list[str]:
    another_config(root, vocab_size=64)
    return ["embedding.word_embeddings.weight", "[61, 32]", "[64, 32]", "vocabulary"]


def a_smaller_vocabulary(root: Path) -> list[str]:
    another_config(root, vocab_size=57)
    return ["embedding.word_embeddings.weight", "61 rows", "57", "vocabulary"]


def no_config(root: Path) -> list[str]:
    shutil.rmtree(root / SIDE)
    return [SIDE, "--model"]


@pytest.mark.parametrize(
    "harm",
    [
        a_flipped_bit,
        a_cut_file,
        a_cut_file_without_checksums,
        a_missing_file,
        no_metadata,
        a_newer_format,
        a_newer_backend,
        more_layers,
        a_wider_model,
        another_family,
        a_tied_config,
        a_larger_vocabulary,
        a_smaller_vocabulary,
        no_config,
    ],
)
def test_a_checkpoint_that_is_not_right_is_refused_and_nothing_is_written(
    converted: Path, tmp_path: Path, harm: Callable[[Path], list[str]]
):
    named = harm(converted)
    with pytest.raises(CheckpointError) as caught:
        megatron_to_hf(find_checkpoint(converted), tmp_path / "back", PLAIN)
    assert [word for word in named if word not in str(caught.value)] == []
    assert [path.name for path in tmp_path.iterdir()] == [converted.name]


def test_weights_of_another_model_than_the_config_are_refused(source: Path, tmp_path: Path):
    folder = shutil.copytree(source, tmp_path / "hf")
    extra = weights_of(source) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    save_file(extra, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_norm\.weight, which the model of its config\.json does not have"):
        hf_to_megatron(folder, tmp_path / "megatron", PLAIN)
    assert not (tmp_path / "megatron").exists()


def test_q_and_k_of_different_types_are_refused(source: Path, tmp_path: Path):
    folder, name = shutil.copytree(source, tmp_path / "hf"), "model.layers.0.self_attn.q_proj.weight"
    tensors = weights_of(source)
    save_file(tensors | {name: tensors[name].bfloat16()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}.*several types"):
        hf_to_megatron(folder, tmp_path / "megatron", PLAIN)


def test_norms_of_another_type_need_a_choice_on_the_way_back(source: Path, tmp_path: Path):
    folder = shutil.copytree(source, tmp_path / "hf")
    tensors = {n: t if "norm" in n else t.bfloat16() for n, t in weights_of(source).items()}
    save_file(tensors, folder / "model.safetensors")
    hf_to_megatron(folder, tmp_path / "megatron", Conversion(verify=True))
    stored = find_checkpoint(tmp_path / "megatron")
    with pytest.raises(CheckpointError, match=r"bfloat16 and float32; .*--dtype"):
        megatron_to_hf(stored, tmp_path / "back", PLAIN)
    megatron_to_hf(stored, tmp_path / "back", PLAIN, dtype=torch.float32)
    assert same_bits(weights_of(tmp_path / "back"), {n: t.float() for n, t in tensors.items()})
