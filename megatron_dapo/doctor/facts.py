"""Where the checks' facts come from on a real machine. Nothing here judges.

What may be broken is asked in a process of its own: a library that crashes when imported, a GPU that hangs.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from megatron_dapo.doctor.gpus import Gpu, Torch
from megatron_dapo.doctor.host import UNLIMITED
from megatron_dapo.doctor.software import Import

PATIENCE = 180.0  # seconds for a library's import, on a cold disk, or for GPUs
DASHBOARD_LIBRARIES = ("aiohttp", "aiohttp_cors", "opencensus")  # of ray[default]
LOOPBACK = "127.0.0.1"

_ASK_TORCH = """
import json, torch
said = {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": None, "gpus": [], "reduced": None}
said["error"] = ""
try:
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        said["gpus"].append([torch.cuda.get_device_name(index), total, free])
    if said["gpus"] and torch.distributed.is_nccl_available():
        said["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if len(said["gpus"]) > 1:
            parts = [torch.full((1024,), float(i), device=f"cuda:{i}") for i in range(len(said["gpus"]))]
            wanted = sum(range(len(parts)))
            torch.cuda.nccl.all_reduce(parts)
            said["reduced"] = all(bool((part == wanted).all()) for part in parts)
except Exception as error:
    said["error"], said["reduced"] = str(error), False if said["nccl"] else None
print(json.dumps(said))
"""


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def requirements() -> list[str]:
    """What this package declares."""
    return requires("megatron_dapo") or []


def ask_torch() -> Torch | str:
    """What torch says, or why it does not."""
    code, out, error = _python(_ASK_TORCH)
    if code:
        return error
    said = json.loads(out.splitlines()[-1])
    return Torch(**said | {"gpus": tuple(Gpu(*gpu) for gpu in said["gpus"])})


def driver_gpus() -> int:
    """GPUs that NVIDIA's driver lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=PATIENCE)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def try_import(module: str) -> Import:
    code, _, error = _python(f"import {module}")
    return Import(code == 0, error)


def can_submit() -> bool:
    """Whether the libraries of Ray's dashboard are there."""
    return all(find_spec(name) is not None for name in DASHBOARD_LIBRARIES)


def free_bytes(path: Path) -> int:
    """That this user may write."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def total_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def existing(path: Path) -> Path:
    """`path`, or the next folder above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def limits() -> dict[str, int]:
    kinds = {
        "open files": resource.RLIMIT_NOFILE,
        "processes": resource.RLIMIT_NPROC,
        "locked memory": resource.RLIMIT_MEMLOCK,
    }
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: UNLIMITED if value == resource.RLIM_INFINITY else value for name, value in found.items()}


def port_opens() -> bool:
    """Whether a port that the system chooses can be listened on and reached."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            return answers(LOOPBACK, server.getsockname()[1])
    except OSError:
        return False


def answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        with socket.create_connection((host or LOOPBACK, port), timeout=5):
            return True
    except OSError:
        return False


def own_address() -> tuple[str, str | None]:
    """This machine's name, and the address that it leads to."""
    name = socket.gethostname()
    with suppress(OSError):
        return name, socket.gethostbyname(name)
    return name, None


def interfaces() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def adapters() -> list[str]:
    """RDMA devices."""
    folder = Path("/sys/class/infiniband")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _python(program: str) -> tuple[int, str, str]:
    """Exit code, output and the last line of the errors of a program in this interpreter."""
    environment: Mapping[str, str] = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, "-c", program]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    except subprocess.TimeoutExpired:
        return 1, "", f"no answer within {PATIENCE:.0f} s"
    last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
    return ended.returncode, ended.stdout, last if ended.returncode >= 0 else f"ended by signal {-ended.returncode}"
