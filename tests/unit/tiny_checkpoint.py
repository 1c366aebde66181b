"""A whole Hugging Face checkpoint of a tiny model: weights, config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.functional.tiny_models import VOCAB, save_tiny_model

FAMILIES = [(family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (False, True)]
FAMILY_NAMES = [f"{family}{'-tied' * tied}" for family, tied in FAMILIES]
TEMPLATE = "{{ messages[0]['content'] }}"


def make_checkpoint(
    path: Path, family: str = "qwen2", tied: bool = False, layers: int = 2, vocab: int = VOCAB, bf16: bool = False
) -> Path:
    save_tiny_model(path, family, tied, layers, vocab=vocab)
    words = ["The", "sum", "of", "12", "and", "30", "is", "42", "Q", "What", "7", "8", "A", "Let", "me", "think"]
    known = {"<end>": 0, "<unknown>": 1} | {word: number + 2 for number, word in enumerate(words)}
    model = Tokenizer(WordLevel(known, unk_token="<unknown>"))
    model.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<end>", chat_template=TEMPLATE
    ).save_pretrained(path)
    transformers.GenerationConfig(eos_token_id=[0, 5], max_new_tokens=7).save_pretrained(path)
    if bf16:
        file = path / "model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        config = path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors in `path`."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )
