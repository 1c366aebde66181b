"""Who may import whom inside the package, held over the imports as they are written.

Read with `ast`: nothing is imported but in the last test. Imports inside functions count; those under
`if TYPE_CHECKING:` count for the tiers and not for what a process loads. `importlib.import_module` is not seen.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "megatron_dapo"
ROOT = Path(__file__).parents[2] / PACKAGE

# From the ground up. A part may import itself and the tiers before its own; parts of one tier never each other.
TIERS = (
    ("types", "config", "exit_codes", "digests", "progress"),
    ("algo", "manifest"),
    ("data", "rewards", "obs"),
    ("mcore", "regression", "rollout", "runtime"),
    ("workers",),
    ("sync",),
    ("verification",),
    ("checkpoints", "conversion", "evaluation", "inspection", "interrupts", "training_step"),
    ("trainer",),
    ("engines",),
    ("assembly",),
    ("checkpoint_commands", "doctor", "launch", "plan"),
    ("cli",),
    ("__main__",),
)
# A library that belongs to one place: a file, or a folder with everything in it.
OWNERS = {
    "megatron": "mcore/",
    "transformer_engine": "mcore/",
    "triton": "mcore/fused/kernels.py",
    "ray": "runtime/ray.py",
    "sglang": "rollout/sglang_engine.py",
    "vllm": "rollout/vllm_extension.py",
    "wandb": "obs/",
    "tensorboard": "obs/",
}
# Scoring processes are started by the dozen: what they load must not bring these.
LIGHT = ("types.py", "config/", "rewards/")
HEAVY = ("torch", "transformers", "megatron", "ray", "sglang", "vllm")


@dataclass(frozen=True)
class Import:
    path: str  # of the importing file, below the package
    line: int
    module: str  # absolute, the imported name included: `from a.b import c` is a.b.c
    for_types_only: bool

    def __str__(self) -> str:
        return f"{PACKAGE}/{self.path}:{self.line} imports {self.module}"


def test_every_import_points_down_the_tiers() -> None:
    faults = tier_faults(package_imports())
    assert not faults, "\n".join(faults)


def test_a_library_with_an_owner_is_imported_only_there() -> None:
    faults = owner_faults(package_imports())
    assert not faults, "\n".join(faults)


def test_nothing_that_a_scoring_process_loads_imports_torch() -> None:
    faults = weight_faults(package_imports())
    assert not faults, "\n".join(faults)


def test_importing_the_light_parts_loads_no_heavy_library() -> None:
    light = [module_name(path) for path in sources() if path.startswith(LIGHT)]
    report = f"import sys, {', '.join(light)}; print(sorted(set({HEAVY}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, cwd=ROOT.parent)
    assert loaded.stdout == "[]\n", f"importing {light} loaded {loaded.stdout}{loaded.stderr}"


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("data/a.py", "from megatron_dapo.trainer import Trainer", "trainer is above data"),
        ("data/a.py", "def f():\n    from megatron_dapo import rewards", "rewards is beside data"),
        ("rollout/a.py", "from ..mcore import model", "mcore is beside rollout"),
        ("types.py", "import megatron_dapo.config.tree", "config is beside types"),
        ("algo/a.py", "from .. import sync", "sync is above algo"),
        ("data/a.py", "if TYPE_CHECKING:\n    import megatron_dapo.cli", "cli is above data"),
        ("extra/a.py", "import megatron_dapo.types", "extra has no tier"),
        ("data/a.py", "import megatron_dapo.extra", "extra has no tier"),
    ],
)
def test_an_import_against_the_tiers_is_told(path: str, text: str, fault: str) -> None:
    (told,) = tier_faults(imports_of({path: text}))
    assert fault in told
    assert f"{PACKAGE}/{path}:{len(text.splitlines())} imports" in told


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("workers/policy.py", "from megatron.core import parallel_state"),
        ("runtime/spmd.py", "import ray"),
        ("rollout/torch_engine.py", "import vllm.engine"),
        ("rollout/vllm_engine.py", "def f():\n    import sglang as s"),
    ],
)
def test_a_library_outside_its_place_is_told(path: str, text: str) -> None:
    (told,) = owner_faults(imports_of({path: text}))
    assert "belongs to" in told


def test_what_is_light_may_not_load_torch_through_another_module() -> None:
    package = {
        "rewards/pool.py": "from megatron_dapo.algo.overlong import penalty",
        "algo/__init__.py": "",
        "algo/overlong.py": "from megatron_dapo.algo.loss import f",
        "algo/loss.py": "import torch.nn.functional as F",
    }
    (told,) = weight_faults(imports_of(package))
    assert told.startswith("megatron_dapo/algo/loss.py:1 imports torch")
    assert "rewards/pool.py -> algo/overlong.py -> algo/loss.py" in told


def test_the_init_of_a_parent_package_is_loaded_too() -> None:
    package = {"config/load.py": "import megatron_dapo.algo.kl", "algo/__init__.py": "import torch", "algo/kl.py": ""}
    assert len(weight_faults(imports_of(package))) == 1


def test_imports_and_neighbours_that_are_allowed_are_not_told() -> None:
    package = {
        "mcore/model.py": "import megatron.core\nfrom .families import dense\nfrom megatron_dapo import types",
        "mcore/families/dense.py": "from ... import algo",
        "types.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "__init__.py": "import math",
        "cli.py": "import megatron_dapo\nfrom megatron_dapo import trainer, __version__",
        "config/load.py": "import omegaconf\nimport megatron_core_is_another_name",
    }
    imports = imports_of(package)
    assert tier_faults(imports) + owner_faults(imports) + weight_faults(imports) == []


def tier_faults(imports: Mapping[str, list[Import]]) -> list[str]:
    height = {part: index for index, tier in enumerate(TIERS) for part in tier}
    order = " <- ".join(", ".join(tier) for tier in TIERS)
    faults = []
    for path, found in imports.items():
        here = part_of(module_name(path))
        for item in found:
            there = part_of(item.module)
            if there in ("", "__version__", here):
                continue
            if here not in height or there not in height:
                unknown = there if here in height else here or "__init__"
                faults.append(f"{item}: {unknown} has no tier; give it one in TIERS ({order})")
            elif height[there] >= height[here]:
                where = "above" if height[there] > height[here] else "beside"
                faults.append(f"{item}: {there} is {where} {here}; imports go down only: {order}")
    return faults


def owner_faults(imports: Mapping[str, list[Import]]) -> list[str]:
    return [
        f"{item}: {library} belongs to {PACKAGE}/{OWNERS[library]} alone"
        for found in imports.values()
        for item in found
        if (library := item.module.partition(".")[0]) in OWNERS and not item.path.startswith(OWNERS[library])
    ]


def weight_faults(imports: Mapping[str, list[Import]]) -> list[str]:
    """Heavy imports in anything that a light file loads, with the way that leads there."""
    way = {path: path for path in imports if path.startswith(LIGHT)}
    faults = []
    for path in (queue := list(way)):
        for item in imports[path]:
            if item.for_types_only:
                continue
            if item.module.partition(".")[0] in HEAVY:
                faults.append(f"{item}, and a scoring process loads it: {way[path]}")
            for loaded in loaded_files(item.module, imports):
                if loaded not in way:
                    way[loaded] = f"{way[path]} -> {loaded}"
                    queue.append(loaded)
    return faults


def loaded_files(module: str, imports: Mapping[str, list[Import]]) -> Iterator[str]:
    """The package's files that importing `module` runs: its own, and `__init__.py` of every folder above it."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return
    for depth in range(len(parts)):
        stem = "/".join(parts[1 : depth + 1])
        yield from (path for path in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")) if path in imports)


def package_imports() -> dict[str, list[Import]]:
    return imports_of(sources())


def sources() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def imports_of(texts: Mapping[str, str]) -> dict[str, list[Import]]:
    return {path: list(_imports(path, ast.parse(text))) for path, text in texts.items()}


def _imports(path: str, tree: ast.AST) -> Iterator[Import]:
    for node, for_types_only in _walk(tree, False):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folders = [PACKAGE, *path.split("/")[:-1]]
                base = ".".join([*folders[: len(folders) - node.level + 1], *([node.module] if node.module else [])])
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            yield Import(path, node.lineno, module, for_types_only)


def _walk(node: ast.AST, for_types_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `node`, and whether it stands under `if TYPE_CHECKING:`."""
    yield node, for_types_only
    guarded = node.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") else []
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, for_types_only or child in guarded)


def module_name(path: str) -> str:
    return ".".join([PACKAGE, *path.removesuffix(".py").removesuffix("__init__").rstrip("/").split("/")]).rstrip(".")


def part_of(module: str) -> str:
    """`data` of `megatron_dapo.data.packing`; empty for the package itself and for other libraries."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == PACKAGE else ""
