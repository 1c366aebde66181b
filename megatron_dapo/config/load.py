"""A run's configuration: a YAML file, then dotted overrides, then the frozen tree of `tree.py`.

The file and the overrides may interpolate (`${data.max_response_length}`) and may use the keys of the public DAPO
recipe, which `recipe_keys.py` translates. Nothing unknown is accepted, and no type is guessed (`convert.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dapo.config.convert import build, leaf_types, to_dict
from megatron_dapo.config.recipe_keys import RECIPE_KEYS, Notice, check_shared, no_meaning, translate, without_effect
from megatron_dapo.config.tree import ConfigError, RunConfig

_LEAVES = frozenset(leaf_types(RunConfig))
_SECTIONS = frozenset(leaf.rsplit(".", depth)[0] for leaf in _LEAVES for depth in range(1, leaf.count(".") + 1))
# A section that a text may stand for -> the setting that the text then is.
_SHORT = {"runtime": "runtime.name"}


@dataclass(frozen=True)
class LoadedConfig:
    """The resolved tree, and what to say of keys that did not go into it as they stand or do nothing."""

    config: RunConfig
    notices: tuple[Notice, ...]


def load_config(path: str | None, overrides: Sequence[str]) -> LoadedConfig:
    """Read `path` (none: the defaults), apply `key=value` overrides in order (the last one wins) and convert.

    `+key=value` and `++key=value` are taken as `key=value`. Raises ConfigError for a file that is missing or is no
    YAML mapping, a malformed override, an unknown key (with the nearest name), a value of the wrong type, a value
    that its section refuses, and recipe keys that contradict each other.
    """
    given = _read_yaml(path) if path is not None else OmegaConf.create({})
    for override in overrides:
        _apply(given, override)
    named = _leaves(OmegaConf.to_container(given))
    _refuse_unknown(named)
    values = _resolve(named)
    own = {name: value for name, value in values.items() if name in _LEAVES}
    recipe = {name: value for name, value in values.items() if name not in _LEAVES}
    translation = translate(recipe, given=own)
    config = build(RunConfig, {**own, **translation.settings})
    check_shared(translation.shared, config)
    return LoadedConfig(config, translation.notices + without_effect(own, config))


def to_yaml(config: RunConfig) -> str:
    """The whole tree as YAML, which `load_config` reads back to the same tree."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def nearest_name(key: str) -> str:
    """The valid dotted name most like `key`: one with the same last part, or failing that the most similar."""
    names = sorted(_LEAVES | RECIPE_KEYS.keys())
    last = key.rsplit(".", 1)[-1]
    same_last = [name for name in names if name.rsplit(".", 1)[-1] == last]
    return max(same_last or names, key=lambda name: SequenceMatcher(None, key, name).ratio())


def _read_yaml(path: str) -> DictConfig:
    if not Path(path).is_file():
        raise ConfigError(f"no configuration file {path}: wanted a YAML file")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a list: wanted a mapping with sections such as data and trainer")
    for section, key in _SHORT.items():
        if isinstance(text := loaded.get(section), str):
            loaded[section] = {key.removeprefix(f"{section}."): text}
    return loaded


def _apply(given: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.removeprefix("+").removeprefix("+")
    if not equals or not all(part and part.strip() == part for part in key.split(".")):
        raise ConfigError(f"malformed override {override!r}: wanted key=value, for example data.train_batch_size=64")
    if not text.strip():
        raise ConfigError(f"malformed override {override!r}: no value; wanted {key}=VALUE, or {key}=null for none")
    try:
        given.merge_with_dotlist([f"{_SHORT.get(key, key)}={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"malformed override {override!r}: {_first_line(error)}") from error


def _resolve(named: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with interpolations replaced by what they stand for, in themselves or in the defaults."""
    tree = OmegaConf.create(to_dict(RunConfig()))
    try:
        for name, value in named.items():
            OmegaConf.update(tree, name, value, merge=False, force_add=True)
        return {name: _resolved(tree, name) for name in named}
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the configuration'}: {_first_line(error)}") from error


def _resolved(tree: DictConfig, name: str) -> Any:
    value = OmegaConf.select(tree, name, throw_on_missing=True)
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    return value


def _leaves(values: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted name -> value. A setting of the tree that is itself a mapping stays whole."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        if "." in str(name):
            raise ConfigError(f"{key}: a dotted name is for the command line; wanted nested sections in a file")
        whole = key in _LEAVES or not isinstance(value, Mapping) or not value
        leaves |= {key: value} if whole else _leaves(value, key)
    return leaves


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    complaints = [_complaint(name, value) for name, value in values.items() if name not in _LEAVES | RECIPE_KEYS.keys()]
    if complaints:
        raise ConfigError("\n".join(complaints))


def _complaint(name: str, value: Any) -> str:
    if name in _SECTIONS:
        return f"{name} is {'null' if value is None else repr(value)}: wanted a section, that is {name}.KEY=VALUE"
    reason = no_meaning(name)
    if reason is not None:
        return f"{name} has no meaning here: {reason}"
    return f"unknown key {name}; the nearest is {nearest_name(name)}"


def _first_line(error: Exception) -> str:
    """What happened; the lines after it are the library's own state."""
    return str(error).partition("\n")[0]
