"""GPUs and NCCL: what torch sees of what there is, and whether GPUs can talk to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_dapo.doctor.finding import Finding, broken, ok, warning

GIB = 1 << 30
FREE_SHARE = 0.95  # of a GPU's memory; less says that another process has some of it


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int  # bytes
    free: int  # bytes


@dataclass(frozen=True)
class Torch:
    """What torch says of itself, in a process of its own."""

    version: str
    cuda: str | None  # that it was built for
    nccl: str | None
    gpus: tuple[Gpu, ...]
    reduced: bool | None  # whether an all-reduce over all GPUs came out right; None: not tried
    error: str  # of what failed


def check_gpus(torch: Torch | str, driver_gpus: int, wanted: int | None) -> list[Finding]:
    """
    Args:
        torch: or why it does not say.
        driver_gpus: that the driver lists; 0 without a driver.
        wanted: on this node; None: not known.
    """
    if isinstance(torch, str):
        return [broken("GPUs", f"torch cannot be imported: {torch}", "python -c 'import torch' says more")]
    found = len(torch.gpus)
    if not found and driver_gpus:
        built = f"torch {torch.version} is built for {'CUDA ' + torch.cuda if torch.cuda else 'the CPU'}"
        remedy = "a torch for this driver's CUDA (docs/installation.md), and look at CUDA_VISIBLE_DEVICES"
        return [broken("GPUs", f"{driver_gpus} in the machine, none for torch: {built}. {torch.error}".strip(), remedy)]
    if not found:
        return [warning("GPUs", "none: a run takes the CPU", "tiny models alone; the examples/arithmetic run is one")]
    names = f"{found} x {torch.gpus[0].name}, {torch.gpus[0].total / GIB:.0f} GiB"
    if wanted is not None and found < wanted:
        return [
            broken("GPUs", f"{names}; trainer.n_gpus_per_node is {wanted}", "lower it, or see what hides the others")
        ]
    findings = [ok("GPUs", names)]
    if busy := [index for index, gpu in enumerate(torch.gpus) if gpu.free < FREE_SHARE * gpu.total]:
        taken = ", ".join(f"GPU {i}: {(torch.gpus[i].total - torch.gpus[i].free) / GIB:.1f} GiB" for i in busy)
        findings.append(warning("GPU memory", f"in use already: {taken}", "nvidia-smi names the processes; end them"))
    return findings


def check_nccl(torch: Torch | str, environment: Mapping[str, str], interfaces: Sequence[str]) -> list[Finding]:
    """Nothing without GPUs."""
    if isinstance(torch, str) or not torch.gpus:
        return []
    if torch.nccl is None:
        return [broken("NCCL", f"torch {torch.version} has none", "a CUDA build of torch (docs/installation.md)")]
    if torch.reduced is False:
        remedy = "run again with NCCL_DEBUG=INFO; look at /dev/shm, and at nvidia-smi topo -m"
        return [
            broken("NCCL", f"{torch.nccl}: an all-reduce over {len(torch.gpus)} GPUs failed: {torch.error}", remedy)
        ]
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if _names_no_interface(environment.get(name, ""), interfaces):
            found = f"{name} is {environment[name]}; this machine has {', '.join(interfaces)}"
            return [broken("NCCL", found, f"name one of them, or unset {name}")]
    tried = f", all-reduce over {len(torch.gpus)} GPUs" if torch.reduced else ""
    return [ok("NCCL", f"{torch.nccl}{tried}")]


def check_fabric(nodes: int, adapters: Sequence[str]) -> list[Finding]:
    """The network between nodes, where a run has several.

    Args:
        adapters: RDMA devices.
    """
    if nodes < 2:
        return []
    if not adapters:
        remedy = "give the container /dev/infiniband, or expect the speed of TCP"
        return [warning("fabric", f"no RDMA device, and the run has {nodes} nodes", remedy)]
    return [ok("fabric", ", ".join(adapters))]


def _names_no_interface(value: str, interfaces: Sequence[str]) -> bool:
    """NCCL takes prefixes, `=` for exact names and `^` for all others."""
    if not value or value.startswith("^"):
        return False
    exact = value.startswith("=")
    names = value.removeprefix("=").split(",")
    return not any(i == name if exact else i.startswith(name) for i in interfaces for name in names)
