"""What a run leaves behind, as far as it must not depend on what happened on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dapo.checkpoints.checksums import check_digests, read_checksums
from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.digests import digest_file, digest_files
from megatron_dapo.obs.jsonl import deterministic_part, read_metrics

# A run of the tiny workspace that crosses an epoch's end, carries groups, evaluates, and saves every other step.
EVENTFUL = [
    "trainer.total_training_steps=8",
    "trainer.save_freq=2",
    "trainer.save_total_limit=2",
    "trainer.test_freq=4",
    "algorithm.filter_groups.surplus=carry",
    "actor_rollout_ref.actor.optim.lr_decay_style=cosine",
    "data.gen_batch_size=6",
]


def record_of(out: Path) -> dict[str, Any]:
    """Metrics, samples, final weights, and the driver's state."""
    steps = read_metrics(out / "metrics.jsonl")
    newest = CheckpointStore(out).entries()[0].path
    return {
        "metrics": [deterministic_part(step) for step in steps],
        "samples": (out / "samples.jsonl").read_text(),
        "weights": digest_file(out / "hf" / "model.safetensors"),
        "state": [(newest / name).read_bytes() for name in ("trainer.json", "arrays.safetensors")],
    }


def assert_whole(out: Path) -> None:
    """What can be found is whole, and `latest` names one of them."""
    store = CheckpointStore(out)
    for entry in store.entries():
        check_digests(entry.path, digest_files(entry.path, read_checksums(entry.path)))
    pointer = store.root / "latest"
    if pointer.exists():
        assert (store.root / pointer.read_text()).is_dir()
