"""One small Ray cluster for all of it: calls, streams and faults of actors, and whole runs beside torchrun's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import ray_cases
from ray_cases import Worker
from tiny_run import make_workspace

from megatron_dapo.obs.jsonl import deterministic_part, read_metrics
from megatron_dapo.runtime.group import RankStalledError, WorkerError
from megatron_dapo.runtime.placement import PlacementError
from megatron_dapo.runtime.ray import RayGroup, RayRuntime, Share

ROOT = Path(__file__).parents[2]
STALLING = Path(__file__).with_name("stalling_run.py")
MEGATRON = "actor_rollout_ref.actor.megatron"
LAYOUTS = {"TP2": [f"{MEGATRON}.tensor_model_parallel_size=2"], "DP2": []}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster with six CPU slots; this process is connected to it."""
    folder = tmp_path_factory.mktemp("r")  # short: the paths of Ray's sockets have a limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # its token would go to the user's home
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        before = set(psutil.Process().children(recursive=True))
        started = start_ray(str(folder))
        yield started.address_info["gcs_address"]
        ray.shutdown()
        _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=20)
        assert not alive, "Ray left processes behind"


def start_ray(folder: str) -> Any:
    """On a busy machine Ray's agents may miss the 15 s that its raylet gives them: then once more, in another session.

    The time is fixed in Ray (https://github.com/ray-project/ray/issues/65983).
    """
    settings: dict[str, Any] = {
        "address": "local",
        "num_cpus": 6,
        "num_gpus": 0,
        "include_dashboard": False,
        "object_store_memory": 200 * 2**20,
        "_temp_dir": folder,
        "log_to_driver": False,
    }
    try:
        return ray.init(**settings)
    except Exception:  # Ray raises no other
        ray.shutdown()
        return ray.init(**settings)


@pytest.fixture
def make_group(cluster: str) -> Iterator[Callable[..., RayGroup]]:
    runtime = RayRuntime(placement_timeout=60, timeout=120)
    yield lambda build=ray_cases.build, nodes=1, ranks=2: runtime.groups([Share(nodes, ranks, build)])[0]
    runtime.close()


@pytest.fixture(scope="module")
def group(cluster: str) -> Iterator[RayGroup]:
    runtime = RayRuntime(placement_timeout=60, timeout=120)
    yield runtime.groups([Share(1, 2, ray_cases.build)])[0]
    runtime.close()


def test_ranks_find_each_other_as_under_torchrun(group: RayGroup) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = group.call_all(ray_cases.environment, names)
    assert found == [dict(zip(names, (str(rank), "2", str(rank), "2"), strict=True)) for rank in (0, 1)]
    assert group.call(Worker.sum_over_ranks, [3, 4]) == [7, 7]


def test_each_rank_gets_its_shard_and_generators_give_lists_of_any_length(group: RayGroup) -> None:
    assert group.call(Worker.describe, ["a", None]) == [(0, "str", "a"), (1, "NoneType", None)]
    assert group.call(Worker.count, [3, 0]) == [[0, 1, 2], []]


def test_items_come_as_they_are_made_not_rank_by_rank(group: RayGroup, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    handle = iter(group.start(Worker.wait_at_a_gate, [None, gate]))
    assert next(handle) == (0, "open")
    Path(gate).touch()  # rank 1 makes its item only now
    assert list(handle) == [(1, "open")]


def test_arrays_are_read_where_they_lie(group: RayGroup) -> None:
    array = np.arange(1_000_000)
    assert group.call_all(Worker.address_of, array) == [(False, float(array.sum()))] * 2
    assert array.flags.writeable


def test_mistakes_of_the_caller_are_told_and_break_nothing(group: RayGroup) -> None:
    with pytest.raises(ValueError, match=r"Worker.count: 1 shards for 2 ranks; give one to each"):
        group.start(Worker.count, [1])
    with pytest.raises(TypeError, match="pickle"):
        group.start(Worker.describe, [(i for i in ()), None])
    handle = group.start(Worker.count, [1, 1])
    with pytest.raises(RuntimeError, match=r"cannot start Worker.count: Worker.count is not finished; take its result"):
        group.start(Worker.count, [1, 1])
    list(handle)
    with pytest.raises(RuntimeError, match=r"items of Worker.count were taken already"):
        handle.result()
    assert group.call(Worker.count, [1, 1]) == [[0], [10]]


def test_an_exception_reaches_a_driver_whose_other_rank_waits_for_ever(make_group: Callable[..., RayGroup]) -> None:
    group = make_group()
    with pytest.raises(WorkerError, match=r"(?s)rank 1 failed in Worker.fail_on_rank_1:.*ValueError: planted") as found:
        group.call_all(Worker.fail_on_rank_1, "raise")
    assert (found.value.rank, found.value.phase) == (1, "Worker.fail_on_rank_1")
    assert 'raise ValueError("planted")' in found.value.traceback


def test_a_killed_rank_is_named_not_the_peer_whose_collective_it_broke(make_group: Callable[..., RayGroup]) -> None:
    group = make_group()
    processes = [psutil.Process(pid) for pid in group.call_all(Worker.process_id)]
    with pytest.raises(WorkerError, match="rank 1 died without a report") as found:
        group.call_all(Worker.fail_on_rank_1, "kill")
    assert (found.value.rank, found.value.phase) == (1, "Worker.fail_on_rank_1")
    group.close()
    assert not psutil.wait_procs(processes, timeout=20)[1]


def test_a_rank_killed_between_calls_is_named_at_the_next(make_group: Callable[..., RayGroup]) -> None:
    group = make_group()
    os.kill(group.call_all(Worker.process_id)[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match="rank 1 died without a report"):
        group.call(Worker.count, [1, 1])


STALL_SECONDS = 4.0


@pytest.fixture
def watched(cluster: str) -> Iterator[RayGroup]:
    runtime = RayRuntime(placement_timeout=60, timeout=120, stall_seconds=STALL_SECONDS)
    yield runtime.groups([Share(1, 2, ray_cases.build)])[0]
    runtime.close()


def test_a_rank_that_stalls_is_named_with_phase_and_stack_and_can_be_asked_aside(watched: RayGroup) -> None:
    watched.on_stall(lambda aside: f"Aside: {[rank for rank, _, _ in aside.call_all(Worker.describe)]}.")
    assert len(watched.call_all(Worker.write_for_long, 2 * STALL_SECONDS)[1]) > 1
    with pytest.raises(RankStalledError) as found:
        watched.call_all(Worker.stall, "sleep")
    assert found.value.rank == 1
    assert "in Worker.stall, micro-batch 3 of 8 while 1 waited (rank 0). Its stack:" in str(found.value)
    assert "time.sleep(1000)" in str(found.value)
    assert str(found.value).endswith("Aside: [0, 1].")


def test_a_stopped_rank_is_named_and_ended(watched: RayGroup) -> None:
    processes = [psutil.Process(pid) for pid in watched.call_all(Worker.process_id)]
    with pytest.raises(RankStalledError, match="rank 1 has not answered for "):
        watched.call_all(Worker.stall, "freeze")
    watched.close()
    assert not psutil.wait_procs(processes, timeout=20)[1]


def test_a_result_that_cannot_travel_is_the_failure_of_its_rank(make_group: Callable[..., RayGroup]) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank [01] failed in Worker.give:.*pickle"):
        make_group().call_all(Worker.give)


def test_a_failure_while_workers_are_built_is_named(make_group: Callable[..., RayGroup]) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 1 failed in start-up:.*OSError: planted at the start"):
        make_group(ray_cases.build_but_rank_1)


def test_a_placement_that_cannot_be_is_told_with_what_is_wanted_and_what_there_is(cluster: str) -> None:
    runtime = RayRuntime(placement_timeout=1, timeout=120)
    with pytest.raises(PlacementError) as found:
        runtime.groups([Share(2, 3, ray_cases.build)])
    said = str(found.value)
    assert "no room for 6 ranks within 1 s. Wanted: 2 x (3 CPU, 0 GPU), each on one node" in said
    assert "The cluster has node 0: 6 CPU, 0 GPU. Free now:" in said


def command(config: Path, out: Path, *overrides: str) -> list[str]:
    return ["-m", "megatron_dapo", "train", str(config), f"trainer.default_local_dir={out}", *overrides]


def start(args: list[str], address: str | None = None) -> subprocess.Popen[str]:
    environment = (
        os.environ | {"TOKENIZERS_PARALLELISM": "false"} | ({} if address is None else {"RAY_ADDRESS": address})
    )
    return subprocess.Popen(
        [sys.executable, *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def under_ray(config: Path, out: Path, address: str, *overrides: str) -> subprocess.Popen[str]:
    return start(command(config, out, "runtime=ray", "trainer.n_gpus_per_node=2", *overrides), address)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out[-1000:] + err[-4000:]
    return err


def metrics(out: Path) -> list[dict[str, Any]]:
    return [deterministic_part(record) for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("ray_runs"), tied=True)


def test_a_cluster_that_is_not_there_ends_the_run_with_one_message(config: Path, tmp_path: Path) -> None:
    said = finish(under_ray(config, tmp_path, "127.0.0.1:1"), 1)
    (line,) = [line for line in said.splitlines() if "megatron-dapo:" in line]
    assert line.startswith("megatron-dapo: ClusterError: no Ray cluster answers at 127.0.0.1:1: ")
    assert "correct runtime.address or RAY_ADDRESS" in line
    assert "Traceback" not in said
    assert (tmp_path / "exit_status").read_text() == "1\n"


@pytest.fixture(scope="module")
def torchrun(cluster: str, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout -> folder of its run under torchrun."""
    folders = {layout: tmp_path_factory.mktemp("torchrun") for layout in LAYOUTS}
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for layout, overrides in LAYOUTS.items():
        finish(start([*ranks, *command(config, folders[layout], *overrides)]))
    return folders


def test_two_runs_side_by_side_are_those_under_torchrun_to_the_last_bit(
    cluster: str, config: Path, torchrun: dict[str, Path], tmp_path: Path
) -> None:
    runs = {layout: under_ray(config, tmp_path / layout, cluster, *overrides) for layout, overrides in LAYOUTS.items()}
    for layout, run in runs.items():
        finish(run)
        assert metrics(tmp_path / layout) == metrics(torchrun[layout])
        samples = (tmp_path / layout / "samples.jsonl", torchrun[layout] / "samples.jsonl")
        assert samples[0].read_text() == samples[1].read_text()


def test_engines_on_ranks_of_their_own_make_the_same_run(
    cluster: str, config: Path, torchrun: dict[str, Path], tmp_path: Path
) -> None:
    apart = ["runtime.colocate=false", "actor_rollout_ref.rollout.n_gpus_per_node=2"]
    finish(under_ray(config, tmp_path, cluster, *LAYOUTS["DP2"], *apart))
    assert metrics(tmp_path) == metrics(torchrun["DP2"])


def test_a_reference_on_ranks_of_its_own_makes_the_same_run(cluster: str, config: Path, tmp_path: Path) -> None:
    kl = [
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_ctrl.kl_coef=0.1",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.kl_loss_coef=0.1",
    ]
    places = {"shared": [], "own": ["actor_rollout_ref.ref.n_gpus_per_node=2"]}
    runs = {name: under_ray(config, tmp_path / name, cluster, *kl, *place) for name, place in places.items()}
    for run in runs.values():
        finish(run)
    assert metrics(tmp_path / "own") == metrics(tmp_path / "shared")
    assert metrics(tmp_path / "own")[-1]["actor/kl_loss"] > 0


@pytest.mark.slow
def test_a_killed_driver_is_started_again_and_goes_on_to_the_same_last_bit(
    cluster: str, config: Path, torchrun: dict[str, Path], tmp_path: Path
) -> None:
    settings = [*LAYOUTS["DP2"], "trainer.save_freq=1", "trainer.logger=[console]"]
    first = under_ray(config, tmp_path, cluster, *settings, "trainer.async_save=false")
    _wait_for(first, "step 2/")
    first.kill()
    first.communicate()
    finish(under_ray(config, tmp_path, cluster, *settings))
    assert metrics(tmp_path) == metrics(torchrun["DP2"])


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_driver_saves_the_state(
    cluster: str, config: Path, tmp_path: Path, number: int, code: int
) -> None:
    run = under_ray(config, tmp_path, cluster, "trainer.total_training_steps=100000", "trainer.logger=[console]")
    _wait_for(run, "step 1/")
    run.send_signal(number)
    finish(run, code)
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step_{steps[-1]:08d}"


@pytest.mark.slow
def test_a_trainer_rank_that_is_killed_ends_the_run_by_name_and_the_next_start_goes_on(
    cluster: str, config: Path, torchrun: dict[str, Path], tmp_path: Path
) -> None:
    settings = [*LAYOUTS["TP2"], "trainer.save_freq=1", "trainer.logger=[console]"]
    before = set(_actors())
    first = under_ray(config, tmp_path, cluster, *settings, "trainer.total_training_steps=100000")
    _wait_for(first, "step 2/")
    max(set(_actors()) - before, key=lambda process: process.create_time()).kill()
    said = finish(first, 1)
    assert "WorkerError: rank " in said
    assert "died without a report" in said
    finish(under_ray(config, tmp_path, cluster, *settings))
    assert metrics(tmp_path)[:4] == metrics(torchrun["TP2"])[:4]


@pytest.mark.parametrize(
    ("fault", "ranks", "engines", "said"),
    [
        ("engine stalls in a push", 2, 1, ("rank 0 of the engines stood still for ", "while the policy waited")),
        pytest.param(
            "policy stalls in a push",
            1,
            2,
            ("rank 0 of the policy stood still for ", "while the engines waited"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_side_that_stalls_in_a_push_is_named_and_the_next_start_goes_on(
    cluster: str, config: Path, tmp_path: Path, fault: str, ranks: int, engines: int, said: tuple[str, str]
) -> None:
    sides = [f"trainer.n_gpus_per_node={ranks}", f"actor_rollout_ref.rollout.n_gpus_per_node={engines}"]
    settings = ["runtime=ray", "runtime.colocate=false", *sides, "trainer.save_freq=1", "trainer.stall_seconds=6"]
    whole = command(config, tmp_path, *settings, "trainer.val_before_train=false")
    stalled = finish(start([str(STALLING), fault, *whole[2:]], cluster), 1)
    assert f"RankStalledError: {said[0]}" in stalled
    assert f"in exchange_weights, bucket 1 of 1 of the weights {said[1]}. Its stack:" in stalled
    assert "in stuck_here" in stalled
    assert "The next start goes on after step 1, from" in stalled
    assert (tmp_path / "exit_status").read_text() == "1\n"
    resumed = start(whole, cluster)
    assert "resuming after step 1 from" in resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def _actors() -> list[psutil.Process]:
    return [each for each in psutil.process_iter() if each.name().startswith("ray::_Rank")]


def _wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    while text not in (line := process.stdout.readline()):
        assert line, process.communicate()[1][-4000:]
