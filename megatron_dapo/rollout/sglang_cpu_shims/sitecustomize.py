"""For SGLang's processes on a host without CUDA: `import torchvision` works beside a CPU build of torch.

Python runs this at the start of every process whose PYTHONPATH has this folder. The torchvision of the package index
is built for CUDA and its compiled operators cannot be loaded; it then fails on describing two of them to torch. They
are declared here without a kernel just before it is imported: who calls one is told by torch that there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OPERATORS = ("nms", "qnms")
libraries = []  # torch forgets the operators when the library object goes


class DeclareOperators(MetaPathFinder):
    """Finds nothing; it only sees that torchvision is about to be imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            libraries.append(library)
        return None


sys.meta_path.insert(0, DeclareOperators())
