from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from megatron_dapo.rollout.decoder import DecodeCache, Decoder, build_model
from tests.unit.rollout.reference import CONFIGS, FAMILIES, VOCAB, prompts, reference_model

CPU = torch.device("cpu")


def decoder_of(family: str) -> Decoder:
    built = build_model(CONFIGS[family](), CPU, torch.float32)
    built.load_state_dict(reference_model(family).state_dict())
    return Decoder(built)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_over_padded_prompts_give_the_logits_of_plain_transformers(family: str) -> None:
    """Prefill, fan out to unequal numbers of rows, 20 forced steps with growth; rows leave on the way."""
    model = reference_model(family)
    decoder = decoder_of(family)
    given = prompts(4, shortest=2)
    lengths = torch.tensor([len(p) for p in given])
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(p) for p in given], batch_first=True, padding_value=9)
    prompt_of_row = torch.tensor([2, 0, 0, 3, 1, 2])
    forced = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (6, 20)))
    logits_of_row = [
        model(torch.cat([torch.from_numpy(given[p]), forced[row]])[None]).logits[0, len(given[p]) - 1 :]
        for row, p in enumerate(prompt_of_row.tolist())
    ]
    with torch.inference_mode():
        logits, kv = decoder.prefill(padded, lengths)
        for row, p in enumerate(prompt_of_row.tolist()):
            torch.testing.assert_close(logits[p], logits_of_row[row][0], atol=2e-5, rtol=0)
        cache = DecodeCache(kv, prompt_of_row, lengths[prompt_of_row], limit=padded.shape[1] + 20)
        rows = [0, 1, 2, 3, 4, 5]
        for step in range(20):
            logits = decoder.step(forced[rows, step], cache)
            expected = torch.stack([logits_of_row[row][step + 1] for row in rows])
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
            if step == 4:  # rows 1 and 4 leave
                cache.compact(torch.tensor([1]), torch.tensor([5]), 4)
                rows = [0, 5, 2, 3]
            if step == 12:  # row 3, the last, leaves
                cache.compact(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long), 3)
                rows = [0, 5, 2]


def test_prompts_of_equal_length_need_no_mask() -> None:
    decoder = decoder_of("qwen2")
    with torch.inference_mode():
        _, kv = decoder.prefill(torch.ones(2, 4, dtype=torch.long), torch.tensor([4, 4]))
        assert DecodeCache(kv, torch.tensor([0, 1]), torch.tensor([4, 4]), 8).mask() is None
        assert DecodeCache(kv, torch.tensor([0, 1]), torch.tensor([4, 3]), 8).mask() is not None


@pytest.mark.parametrize(
    "config, message",
    [
        (BertConfig(), "model_type is 'bert'; the torch engine runs llama, qwen2, qwen3"),
        (
            Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1),
            r"layer_types has \['full_attention', 'sliding_attention'\].* use_sliding_window",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type is 'dynamic'; the torch engine runs default, linear, llama3, yarn",
        ),
    ],
    ids=["family", "sliding window", "rotary embedding"],
)
def test_a_model_that_would_decode_wrongly_is_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(config, CPU, torch.float32)


def test_the_callers_config_is_left_as_it_was() -> None:
    config = CONFIGS["qwen2"]()
    before = config.to_dict(), config._attn_implementation
    build_model(config, CPU, torch.bfloat16)
    assert (config.to_dict(), config._attn_implementation) == before
