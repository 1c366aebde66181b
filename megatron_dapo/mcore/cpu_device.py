"""Lets unmodified Megatron-Core 0.16 run without CUDA; does nothing where CUDA is there.

Megatron names CUDA in factories (`device="cuda"`), RNG state, streams and `Tensor.type()`. An import hook rebinds the
global `torch` of every `megatron.core` module to a proxy that answers those for the CPU. torch itself keeps its own
functions: wrapping `torch.zeros` and its like for everybody breaks `with torch.device(...)`, and with it the rotary
table of models that transformers builds on the meta device.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_PACKAGE = "megatron.core"
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


def enable_cpu() -> None:
    """Install the hook. Must run before the first import of `megatron.core`.

    Raises:
        RuntimeError: `megatron.core` is imported already, so its modules hold the real `torch`.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _PACKAGE in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_dapo.mcore, so it would look for CUDA on this machine, "
            "which has none; import megatron_dapo.mcore first"
        )
    sys.meta_path.insert(0, _Finder(_cpu_torch()))
    _cuda_moves_nothing()


def _cpu_torch() -> types.ModuleType:
    rng = {
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    cuda = _Proxy(
        torch.cuda,
        current_device=lambda: _CPU,
        synchronize=_nothing,
        empty_cache=_nothing,
        set_device=_nothing,
        random=_Proxy(torch.cuda.random, **rng),
        Stream=_Null,
        Event=_Null,
        current_stream=_Null,
        default_stream=_Null,
        **rng,
    )
    return _Proxy(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _cuda_moves_nothing() -> None:
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers dispatch on "torch.cuda.FloatTensor".
        name = plain_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(name, str) and caller.startswith("megatron.core.optimizer"):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = type_name  # type: ignore[method-assign]


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Null:
    """Stands for streams and events: every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


class _Proxy(types.ModuleType):
    """A module that answers some names itself and asks the real one for the rest."""

    def __init__(self, real: types.ModuleType, **overrides: Any):
        super().__init__(real.__name__)
        self.__dict__.update(overrides, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _Finder:
    """Rebinds `torch` in each module of Megatron-Core right after the module has run."""

    def __init__(self, proxy: types.ModuleType):
        self.proxy = proxy

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_PACKAGE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            run(module)
            self._rebind(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _rebind(self, module: types.ModuleType) -> None:
        if getattr(module, "torch", None) is torch:
            module.torch = self.proxy  # type: ignore[attr-defined]
        if module.__name__ == "megatron.core.tensor_parallel.random":  # goes through torch.cuda._lazy_call
            module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)  # type: ignore[attr-defined]
        if module.__name__ == "megatron.core.jit":
            module.disable_jit_fuser()  # type: ignore[attr-defined]
