"""From plain values to the frozen sections of `tree.py`, and back: nothing is guessed.

A number is not text, true is not 1, 8.0 is not 8. The two liberties are an integer where a number is wanted, and one
text where a list of texts is wanted, because the recipe's users write `data.train_files=x.parquet`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_dapo.config.tree import ConfigError, RunConfig

Section = TypeVar("Section")

_SCALARS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}


def leaf_types(cls: type, path: str = "") -> dict[str, Any]:
    """Every setting below the section of class `cls` at `path`: dotted name -> annotation."""
    leaves: dict[str, Any] = {}
    for name, wanted in get_type_hints(cls).items():
        key = _join(path, name)
        leaves |= leaf_types(wanted, key) if _is_section(wanted) else {key: wanted}
    return leaves


def build(cls: type[Section], leaves: Mapping[str, object], path: str = "") -> Section:
    """The section of class `cls` at `path` from settings by dotted name; those that are absent keep their defaults.

    Raises ConfigError where a value has another type than its field and where a section refuses a value.
    """
    found: dict[str, Any] = {}
    for name, wanted in get_type_hints(cls).items():
        key = _join(path, name)
        if _is_section(wanted):
            found[name] = build(wanted, leaves, key)
        elif key in leaves:
            found[name] = to_type(wanted, leaves[key], key)
    try:
        return cls(**found)
    except ConfigError as error:  # a section knows its fields, not where it stands
        raise ConfigError(_join(path, str(error))) from None


def to_type(wanted: Any, value: object, key: str) -> Any:
    """`value` as the annotation `wanted` says, or ConfigError naming `key`, what was found and what is wanted."""
    origin, args = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        (inner,) = (arg for arg in args if arg is not NoneType)
        return None if value is None else to_type(inner, value, key)
    if origin is tuple:
        return _to_tuple(wanted, value, key)
    if origin is dict and isinstance(value, Mapping):
        return {to_type(args[0], k, key): to_type(args[1], v, _join(key, str(k))) for k, v in value.items()}
    if wanted is float and type(value) is int:
        return float(value)
    fits = value in args if origin is Literal and isinstance(value, str) else type(value) is wanted
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong_type(key, value, _describe(wanted))
    return value


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The tree as nested plain dicts and lists, as YAML and JSON hold it."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _to_tuple(wanted: Any, value: object, key: str) -> tuple[Any, ...]:
    kinds = get_args(wanted)
    if Ellipsis in kinds:
        value = [value] if isinstance(value, str) else value
        kinds = (kinds[0],) * len(value) if isinstance(value, list) else ()
    if not isinstance(value, list) or len(value) != len(kinds):
        raise _wrong_type(key, value, _describe(wanted))
    return tuple(to_type(kind, item, f"{key}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _describe(wanted: Any) -> str:
    """An annotation in words."""
    origin = get_origin(wanted)
    args: tuple[Any, ...] = get_args(wanted)
    if origin is Literal:
        choices = ", ".join(args)
        return f"one of {choices}" if len(args) > 1 else f"{choices}, the only choice"
    if origin is tuple:
        if Ellipsis not in args:
            return f"a list of {len(args)} numbers"
        return "a list of text" if args[0] is str else f"a list of texts, each {_describe(args[0])}"
    return "a mapping of text to text" if origin is dict else _SCALARS[wanted]


def _wrong_type(key: str, value: object, wanted: str) -> ConfigError:
    kind = _SCALARS.get(type(value), "a list" if isinstance(value, list) else "a mapping")
    found = "null" if value is None else f"{value!r} ({kind})"
    if isinstance(value, float) and not math.isfinite(value):
        wanted = f"{wanted}, finite"
    remedy = f"""; as text it is quoted: {key}='"..."'""" if wanted == "text" and isinstance(value, int | float) else ""
    return ConfigError(f"{key} is {found}: wanted {wanted}{remedy}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _is_section(wanted: Any) -> TypeGuard[type]:
    return isinstance(wanted, type) and is_dataclass(wanted)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
