"""What setup.py declares against what the package imports, and the lock against what setup.py declares.

setup.py is read, not run, so this holds in a checkout whose package is not installed.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "constraints" / "cpu.txt"
# Import name -> distribution, for what need not be installed here.
NOT_INSTALLED = {
    "ray": "ray",
    "sglang": "sglang",
    "vllm": "vllm",
    "wandb": "wandb",
    "transformer_engine": "transformer-engine",
    "triton": "triton",
}


def test_every_library_that_the_package_imports_is_declared() -> None:
    declared = {canonicalize_name(each.name) for each in requirements()}
    distributions = packages_distributions()
    for library in sorted(third_party_imports()):
        names = [NOT_INSTALLED[library]] if library in NOT_INSTALLED else distributions.get(library, [library])
        assert declared & {canonicalize_name(name) for name in names}, (
            f"megatron_dapo imports {library} (of {', '.join(names)}), which setup.py does not declare; add it to CORE "
            "or to an extra"
        )


@pytest.mark.parametrize("lock", sorted(LOCK.parent.glob("*.txt")), ids=lambda path: path.stem)
def test_a_lock_holds_one_exact_version_a_line_and_nothing_else(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)] == []


def test_the_lock_fits_what_setup_py_declares() -> None:
    lock = {canonicalize_name(name): version for name, version in re.findall(r"^(\S+)==(\S+)$", LOCK.read_text(), re.M)}
    for requirement in requirements("dev"):
        version = lock.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is declared and not locked; `make setup`, then `make lock`"
        assert requirement.specifier.contains(version), f"{LOCK.name} has {version}, setup.py wants {requirement}"


def test_the_lock_has_the_torch_that_the_tests_run_on() -> None:
    assert "torch==2.13.0" in LOCK.read_text().splitlines()


def test_the_command_leads_to_a_function_that_exists() -> None:
    (target,) = re.findall(r'"megatron-dapo = ([\w.]+:\w+)"', (ROOT / "setup.py").read_text())
    module, function = target.split(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def requirements(*extras: str) -> list[Requirement]:
    """What the package always needs, and what `extras` add; all extras where none is named."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    literals = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict)
    }
    texts = literals["CORE"] + [text for extra in extras or literals["EXTRAS"] for text in literals["EXTRAS"][extra]]
    return [Requirement(text) for text in texts]


def third_party_imports() -> set[str]:
    found = set()
    for path in (ROOT / "megatron_dapo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"megatron_dapo"}
