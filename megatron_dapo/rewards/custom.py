"""A user's own reward function, from a file: `custom_reward_function.path` and `.name`.

Its signature is the recipe's: `fn(data_source, solution_str, ground_truth, extra_info=None)`, called by keyword; it
returns a number, or a dict with `score`. The file is run where this is called, so only scoring workers call it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from megatron_dapo.config.tree import ConfigError

MODULE_NAME = "custom_reward_function"
ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def load_function(path: str, name: str) -> Callable[..., object]:
    """The function `name` of the file `path`.

    Raises:
        ConfigError: no such file, no such function in it, or one that cannot be called with the recipe's arguments.
        Exception: whatever running the file raises.
    """
    check_file(path)
    module = _run(path)
    function = vars(module).get(name)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ConfigError(
            f"custom_reward_function.name is {name!r}, and {path} has no function of that name; "
            f"it has: {', '.join(own) or 'none'}"
        )
    try:
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise ConfigError(
            f"{name} of {path} takes {inspect.signature(function)}, and is called with the keywords "
            f"{', '.join(ARGUMENTS)}: {error}; add what is missing, or **kwargs"
        ) from error
    return function


def check_file(path: str) -> None:
    """Raises ConfigError where there is no such file."""
    if not Path(path).is_file():
        raise ConfigError(f"custom_reward_function.path is {path!r}: there is no such file (seen from {Path.cwd()})")


def _run(path: str) -> ModuleType:
    loader = SourceFileLoader(MODULE_NAME, path)
    spec = importlib.util.spec_from_loader(MODULE_NAME, loader)
    assert spec is not None  # a loader was given
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module  # dataclasses and pickle look a class's module up there
    loader.exec_module(module)
    return module
