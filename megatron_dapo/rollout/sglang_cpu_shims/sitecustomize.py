"""For SGLang's processes on a host without CUDA: it can import the little of torchvision that it does at its start.

Python runs this at the start of every process whose PYTHONPATH has this folder. The torchvision of the package index
is built for CUDA: beside a CPU build of torch it cannot be imported, and then transformers' models cannot either. So
it is not installed. `import torchvision` finds the names in `without_install`; `importlib.util.find_spec`, by which
transformers asks whether it is installed, does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

STAND_INS = [str(Path(__file__).parent / "without_install")]


class StandIns(MetaPathFinder):
    """After all other finders: what is installed is taken from there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision" or _asks_whether_installed():
            return None
        return PathFinder.find_spec(name, STAND_INS)


def _asks_whether_installed() -> bool:
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
        frame = frame.f_back
    return frame is not None and frame.f_globals["__name__"] == "importlib.util"


sys.meta_path.append(StandIns())
