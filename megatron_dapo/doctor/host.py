"""The host: shared memory, limits of a process, disk, ports, its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_dapo.doctor.finding import Finding, broken, ok, warning
from megatron_dapo.sync.ring import LARGEST

GIB = 1 << 30
UNLIMITED = -1
OPEN_FILES = (4096, 65536)  # fewer: Ray and NCCL run out with 8 ranks; fewer: a big cluster's head does
PROCESSES = (1024, 16384)
RAY_PORTS = {6379: "a Ray head or Redis", 8265: "a Ray dashboard"}


def check_shared_memory(free: int, ranks: int, bucket_bytes: int, gpus: int) -> Finding:
    """
    Args:
        free: bytes of /dev/shm.
        ranks: of this node, each of which pushes weights through buckets.
    """
    subject, found = "/dev/shm", f"{free / GIB:.1f} GiB free"
    needed = (LARGEST + ranks) * bucket_bytes  # the node's ring, and what each engine hands to its server
    if free < needed:
        remedy = f"docker run --shm-size={-(-needed // GIB)}g or --ipc=host, or lower rollout.weight_sync.bucket_bytes"
        return broken(subject, f"{found}, weights on their way to {ranks} engines take {needed / GIB:.1f}", remedy)
    if gpus and free < 2 * GIB * gpus:
        return warning(subject, f"{found}: NCCL, Ray and data live there", f"--shm-size={4 * gpus}g or --ipc=host")
    return ok(subject, found)


def check_limits(limits: Mapping[str, int], nodes: int) -> list[Finding]:
    """
    Args:
        limits: of this process: `open files`, `processes`, `locked memory` (bytes); -1 is unlimited.
    """
    findings = []
    for name, flag, (least, good) in (("open files", "-n", OPEN_FILES), ("processes", "-u", PROCESSES)):
        value, remedy = limits[name], f"ulimit {flag} {good}, in the shell or service that starts the run"
        if value == UNLIMITED or value >= good:
            findings.append(ok(f"ulimit {flag}", f"{_number(value)} {name}"))
        else:
            judge = broken if value < least else warning
            findings.append(judge(f"ulimit {flag}", f"{value} {name}; {good} are enough for 8 ranks and Ray", remedy))
    locked = limits["locked memory"]
    if nodes > 1 and locked != UNLIMITED:
        remedy = "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK; docker: --ulimit memlock=-1)"
        findings.append(warning("ulimit -l", f"{locked / 1024:.0f} KiB locked memory: RDMA needs more", remedy))
    return findings


def check_disk(free: int, path: Path, is_writable: bool, checkpoint_bytes: int, checkpoints: int) -> Finding:
    """
    Args:
        path: where checkpoints go, or the next folder above it that is there.
        checkpoints: that lie there at once.
    """
    subject, found = "disk", f"{free / GIB:.0f} GiB free at {path}"
    if not is_writable:
        return broken(subject, f"{path} cannot be written", "another trainer.default_local_dir, or its permissions")
    needed = checkpoints * checkpoint_bytes
    if needed and free < needed:
        size = f"{checkpoints} checkpoints of about {checkpoint_bytes / GIB:.0f} GiB"
        return broken(subject, f"{found}; a run keeps {size}", "make room, or lower trainer.save_total_limit")
    if free < 10 * GIB:
        return warning(subject, found, "make room: a run writes checkpoints, logs and samples")
    return ok(subject, found)


def check_scratch(free: int, total: int, path: Path) -> Finding:
    """Ray keeps sockets, logs and what does not fit into memory there."""
    found = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free at {path}"
    if free < 0.05 * total:
        return broken("scratch", f"{found}: Ray stops at 95 % full", f"make room in {path}, or set TMPDIR or RAY_TMP")
    return ok("scratch", found)


def check_ports(opens: bool, taken: Mapping[int, bool], starts_ray: bool) -> list[Finding]:
    """
    Args:
        opens: whether a port that the system chooses can be listened on and reached.
        taken: port -> whether somebody listens there.
        starts_ray: whether a head could be started here.
    """
    if not opens:
        remedy = "loopback must be up and unfiltered: ip link set lo up; look at the firewall"
        return [broken("ports", "a port of this machine cannot be listened on and reached", remedy)]
    busy = [f"{port} ({RAY_PORTS[port]})" for port, is_taken in sorted(taken.items()) if is_taken]
    if busy and starts_ray:
        remedy = "join that cluster with RAY_ADDRESS, or give a head of its own RAY_PORT and DASHBOARD_PORT"
        return [warning("ports", f"in use: {', '.join(busy)}", remedy)]
    return [ok("ports", "free ports open" + (f"; in use: {', '.join(busy)}" if busy else ""))]


def check_hostname(name: str, address: str | None, nodes: int) -> list[Finding]:
    """Whether other nodes reach this one by the address that its name leads to."""
    if address is None:
        return [warning("host name", f"{name} leads to no address", "an entry in /etc/hosts or the DNS")]
    if address.startswith("127.") and nodes > 1:
        remedy = "set HEAD_ADDRESS, or let the name lead to the network's address in /etc/hosts"
        return [warning("host name", f"{name} is {address}, which other nodes cannot reach", remedy)]
    return [ok("host name", f"{name} is {address}")]


def _number(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)
