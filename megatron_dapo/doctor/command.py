"""`megatron-dapo doctor [CONFIG.yaml] [key=value ...]`: each line ok, warning or broken, with what to do about it.

With a configuration the machine is held against what that run wants. Exit codes: 0 nothing is broken, 1 something is.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_dapo.config.check import check, check_files, planned_world_size
from megatron_dapo.config.load import load_config
from megatron_dapo.config.tree import ConfigError
from megatron_dapo.doctor import facts, gpus, host, software
from megatron_dapo.doctor.finding import Finding, broken, ok
from megatron_dapo.doctor.wanted import UNKNOWN, Wanted, wanted_by
from megatron_dapo.exit_codes import DONE, FAILED

_STYLES = {"ok": "green", "warning": "yellow", "broken": "red"}


def add_doctor(commands: Any) -> None:
    """Add `doctor` to the subcommands of `megatron-dapo`."""
    meaning = "check what a run needs of this machine; with a configuration, what that run needs"
    sub = commands.add_parser("doctor", help=meaning, description=meaning)
    sub.add_argument("words", nargs="*", metavar="[CONFIG.yaml] key=value")
    sub.set_defaults(plain=_doctor)


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    wanted, first = _read(arguments.words)
    levels = []
    for finding in [*first, *examine(wanted)]:
        levels.append(finding.level)
        console.print(f"[{_STYLES[finding.level]}]{finding.level:<8}[/]", end="")
        console.print(f"{finding.subject:<20} {finding.found}", markup=False, highlight=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"{'':<28} -> {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
    counts = ", ".join(f"{levels.count(level)} {level}" for level in _STYLES)
    console.print(counts, markup=False, highlight=False)
    return FAILED if "broken" in levels else DONE


def examine(wanted: Wanted) -> Iterator[Finding]:
    """All checks on this machine, each as soon as it is through."""
    yield from _software(wanted)
    torch, driver = facts.ask_torch(), facts.driver_gpus()
    count = 0 if isinstance(torch, str) else len(torch.gpus)
    yield from gpus.check_gpus(torch, driver, wanted.gpus_per_node)
    yield from gpus.check_nccl(torch, os.environ, facts.interfaces())
    yield from gpus.check_fabric(wanted.nodes, facts.adapters())
    yield from software.check_accelerated(facts.requirements(), facts.installed, count)
    yield from _host(wanted, count)


def _read(words: Sequence[str]) -> tuple[Wanted, list[Finding]]:
    """What the configuration wants, and whether it can be."""
    if not words:
        return UNKNOWN, []
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one configuration file is wanted, {len(files)} are named: {', '.join(files)}")
    config = load_config(files[0] if files else None, [word for word in words if "=" in word]).config
    wanted = wanted_by(config, os.environ.get("RAY_ADDRESS"))
    try:
        check(config, planned_world_size(config) or 1)
        check_files(config)
    except ConfigError as error:
        return wanted, [broken("configuration", str(error), "change the configuration, or put the files there")]
    return wanted, [ok("configuration", files[0] if files else "the defaults and the settings given")]


def _software(wanted: Wanted) -> Iterator[Finding]:
    yield software.check_python(sys.version_info[:2], sys.prefix)
    yield from software.check_requirements(facts.requirements(), facts.installed)
    yield software.check_ray(facts.installed, facts.can_submit(), wanted.ray)
    yield from software.check_ray_address(wanted.ray_address, facts.answers)
    for name in software.ENGINES:
        if wanted.engine in (None, name):
            imported = lambda name=name: facts.try_import(name)  # noqa: E731
            yield software.check_engine(name, facts.installed, imported, wanted.engine == name)
    yield from software.check_stray_variables(os.environ)


def _host(wanted: Wanted, gpu_count: int) -> Iterator[Finding]:
    ranks = wanted.gpus_per_node or gpu_count or 1
    yield host.check_shared_memory(facts.free_bytes(Path("/dev/shm")), ranks, wanted.bucket_bytes, gpu_count)
    yield from host.check_limits(facts.limits(), wanted.nodes)
    output = facts.existing(wanted.output)
    writable = os.access(output, os.W_OK)
    yield host.check_disk(facts.free_bytes(output), output, writable, wanted.checkpoint_bytes, wanted.checkpoints)
    scratch = Path(tempfile.gettempdir())
    yield host.check_scratch(facts.free_bytes(scratch), facts.total_bytes(scratch), scratch)
    taken = {port: facts.answers(facts.LOOPBACK, port) for port in host.RAY_PORTS}
    yield from host.check_ports(facts.port_opens(), taken, wanted.ray_address is None)
    yield from host.check_hostname(*facts.own_address(), wanted.nodes)
