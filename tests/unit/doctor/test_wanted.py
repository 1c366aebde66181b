"""What a configuration wants of the machine."""

from __future__ import annotations

from pathlib import Path

from megatron_dapo.config.load import load_config
from megatron_dapo.doctor.wanted import wanted_by


def test_a_configuration_says_what_it_wants(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(2000))  # 1000 parameters in bfloat16
    settings = ["runtime=ray", "trainer.nnodes=16", "trainer.n_gpus_per_node=8", "trainer.save_total_limit=3"]
    settings += [f"actor_rollout_ref.model.path={tmp_path}", "actor_rollout_ref.rollout.name=sglang"]
    wanted = wanted_by(load_config(None, settings).config, "10.0.0.1:6379")
    assert (wanted.engine, wanted.ray, wanted.ray_address) == ("sglang", True, "10.0.0.1:6379")
    assert (wanted.nodes, wanted.gpus_per_node) == (16, 8)
    assert (wanted.checkpoint_bytes, wanted.checkpoints) == (14_000, 4)
    assert wanted.bucket_bytes == 536870912


def test_the_configurations_address_goes_before_the_environments_and_the_embedded_engine_needs_no_server() -> None:
    wanted = wanted_by(load_config(None, ["runtime.address=10.0.0.2:6379"]).config, "10.0.0.1:6379")
    assert (wanted.ray_address, wanted.engine, wanted.bucket_bytes) == ("10.0.0.2:6379", None, 0)
