"""Which engine a rank has, made from the configuration: the table of engines by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from megatron_dapo.config.tree import ConfigError, RunConfig
from megatron_dapo.mcore.model import DTYPES
from megatron_dapo.mcore.parallel import device
from megatron_dapo.rollout.engine import RolloutEngine
from megatron_dapo.rollout.no_engine import NoEngine
from megatron_dapo.rollout.sglang_engine import SGLangEngine
from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.rollout.vllm_engine import VLLMEngine
from megatron_dapo.runtime.devices import engine_devices


def make_engine(config: RunConfig) -> RolloutEngine:
    """That of this rank, without weights.

    Raises:
        ConfigError: the checkpoint names no token that ends a response.
        ValueError: settings that the engine does not have on this device.
        EngineFailedError: its server did not start.
    """
    if int(os.environ.get("RANK", 0)) % ranks_per_engine(config):
        return NoEngine()
    return ENGINES[config.actor_rollout_ref.rollout.name](config)


def ranks_per_engine(config: RunConfig) -> int:
    """Ranks whose devices one engine takes. On ranks of its own an engine's rank has them all."""
    rollout = config.actor_rollout_ref.rollout
    return rollout.tensor_model_parallel_size if config.runtime.colocate and rollout.name != "torch" else 1


def end_token_ids(model_path: str) -> tuple[int, ...]:
    """The tokens that end a response: those of generation_config.json and the tokenizer's own.

    Raises:
        ConfigError: the checkpoint names none.
    """
    found: list[int] = []
    if (Path(model_path) / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(model_path).eos_token_id
        found += [ids] if isinstance(ids, int) else list(ids or [])
    tokenizer_id = AutoTokenizer.from_pretrained(model_path).eos_token_id
    found += [] if tokenizer_id is None else [tokenizer_id]
    if not found:
        raise ConfigError(
            f"{model_path} names no end-of-sequence token, so no response would ever end; "
            "set eos_token in tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return tuple(dict.fromkeys(found))


def _torch_engine(config: RunConfig) -> TorchEngine:
    section = config.actor_rollout_ref
    return TorchEngine(
        section.model.path,
        end_token_ids(section.model.path),
        max_num_seqs=section.rollout.max_num_seqs,
        device=device(),
        dtype=DTYPES[section.actor.megatron.params_dtype],
    )


def _served_by(engine: type[SGLangEngine] | type[VLLMEngine]) -> Callable[[RunConfig], RolloutEngine]:
    def make(config: RunConfig) -> RolloutEngine:
        section, where, rank = config.actor_rollout_ref, device(), int(os.environ.get("RANK", 0))
        return engine(
            section.model.path,
            end_token_ids(section.model.path),
            section.rollout,
            dtype=DTYPES[section.actor.megatron.params_dtype],
            devices=_engine_devices(config) if where.type == "cuda" else None,
            log=Path(config.trainer.default_local_dir) / "logs" / f"{section.rollout.name}_rank{rank}.log",
        )

    return make


def _engine_devices(config: RunConfig) -> tuple[str, ...]:
    wanted, local_rank = config.actor_rollout_ref.rollout.tensor_model_parallel_size, device().index
    return engine_devices(wanted, local_rank, torch.cuda.device_count(), os.environ)


ENGINES: Mapping[str, Callable[[RunConfig], RolloutEngine]] = {
    "torch": _torch_engine,
    "sglang": _served_by(SGLangEngine),
    "vllm": _served_by(VLLMEngine),
}
