"""Writes docs/configuration.md and docs/metrics.md from the tables in the code: `python tools/write_docs.py`.

With `--check` it writes nothing and fails if a page is not what the code says.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from megatron_dapo.config.recipe_keys import RECIPE_KEYS, NoEffect, Same, SharedWith, Translated
from megatron_dapo.config.tree import RunConfig
from megatron_dapo.obs.metric_table import METRICS

DOCS = Path(__file__).parent.parent / "docs"

CONFIGURATION = """# Configuration

A YAML file and `key=value` overrides; the last one wins. Names are the public DAPO recipe's. Unknown keys are refused
with the nearest name, wrong types with what was wanted. Batch sizes count prompts, lengths tokens, times seconds.
Megatron's own settings stand under `actor_rollout_ref.actor.megatron` under Megatron's own names.

Written by `tools/write_docs.py` from `megatron_dapo/config`.

## Every setting

| key | default | |
| --- | --- | --- |
{settings}

## The recipe's keys

Every key that the recipe's three 32B scripts set, and what becomes of it. The last two kinds are printed when a run
starts.

| key | here |
| --- | --- |
{recipe}
"""

METRIC_PAGE = """# Metrics

Every number of `metrics.jsonl`, which the other loggers get too. `seconds/`, `memory/` and `throughput/` depend on
the machine; all others are the same to the last bit in two runs with one seed.

Written by `tools/write_docs.py` from `megatron_dapo/obs/metric_table.py`.

| name | unit | meaning |
| --- | --- | --- |
{metrics}
"""


def pages() -> dict[str, str]:
    """File name -> what it must hold."""
    return {
        "configuration.md": CONFIGURATION.format(
            settings="\n".join(f"| `{key}` | {default} | {meaning} |" for key, default, meaning in settings(RunConfig)),
            recipe="\n".join(f"| `{key}` | {_cell(_fate(status))} |" for key, status in RECIPE_KEYS.items()),
        ),
        "metrics.md": METRIC_PAGE.format(
            metrics="\n".join(f"| `{name}` | {m.unit} | {_cell(m.meaning)} |" for name, m in METRICS.items())
        ),
    }


def settings(section: type, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, the comment behind it) of every leaf."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(section), re.MULTILINE))
    types = get_type_hints(section)
    for field in fields(section):
        key = f"{path}{field.name}"
        if is_dataclass(types[field.name]):
            yield from settings(types[field.name], f"{key}.")
        else:
            yield key, f"`{_default(field)}`", _cell(comments.get(field.name, ""))


def _fate(status: Same | Translated | SharedWith | NoEffect) -> str:
    match status:
        case Same():
            return "the same"
        case Translated(kind=kind, to=to):
            return "translated to " + ", ".join(f"`{name}`" for name in to(kind(1)))
        case SharedWith(key=key, reason=reason):
            return f"must equal `{key}`: {reason}"
        case NoEffect(reason=reason):
            return f"no effect: {reason}"


def _default(field: Field[Any]) -> Any:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return "null" if value is None else list(value) if isinstance(value, tuple) else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    check = parser.parse_args().check
    for name, text in pages().items():
        path = DOCS / name
        if check and (not path.exists() or path.read_text() != text):
            print(f"{path} is not what the code says: run python tools/write_docs.py", file=sys.stderr)
            return 1
        if not check:
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
