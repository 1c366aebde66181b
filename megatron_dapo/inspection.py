"""Checkpoints in tables: which there are, what one holds, and whether its files are what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_dapo.manifest import (
    CHECKSUMS,
    META,
    MODEL,
    Fault,
    Stored,
    check_backend,
    find_checkpoint,
    find_faults,
    read_checksums,
    read_meta,
)
from megatron_dapo.types import CheckpointError

_OPTIMIZER = "optimizer."


def list_checkpoints(path: Path) -> Table:
    """A row a checkpoint of the run at `path` (or of its `checkpoints/`, or the one that it is), the oldest first.

    Raises:
        CheckpointError: there is none.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(child for child in folder.glob("[!.]*") if (child / MODEL).is_dir()) if folder.is_dir() else []
    roots = found or [find_checkpoint(path).root]
    pointer = folder / "latest"
    latest = pointer.read_text().strip() if pointer.is_file() else None
    table = Table()
    for name in ("checkpoint", "step", "saved", "layout", "model", "size", "checksums", ""):
        table.add_column(name, no_wrap=name in ("checkpoint", "step", "size", ""))
    for root in roots:
        table.add_row(root.name, *_summary(root), "latest" if root.name == latest else "")
    return table


def show_checkpoint(path: Path) -> list[Table]:
    """All that `meta.json` says, and what tensors the checkpoint holds.

    Raises:
        CheckpointError: there is none at `path`, or its files cannot be read.
    """
    from megatron_dapo.mcore.safe_load import refuse_foreign_pickles  # torch: seconds that `ls` need not wait for

    stored = find_checkpoint(path)
    about = Table("field", "value", title=str(stored.root), title_justify="left")
    for name, value in _flat(read_meta(stored.root)):
        about.add_row(name, str(value))
    check_backend(stored.model)
    about.add_row("size on disk", _size(sum(file.stat().st_size for file in _files(stored.root))))
    about.add_row("files with a checksum", str(len(read_checksums(stored.root))))
    parts = Table("part", "tensors", "numbers", "size", "types", title="tensors", title_justify="left")
    for name, row in _parts(refuse_foreign_pickles(stored.model)):
        parts.add_row(name, *row)
    return [about, parts]


def verify_checkpoint(path: Path, on_bytes: Callable[[int, int], None]) -> Iterator[Fault]:
    """Everything wrong with the checkpoint at `path`; reads all of its files. `on_bytes` gets (read, in all).

    Raises:
        CheckpointError: there is none, `meta.json` or `checksums.json` cannot be read, or the format is newer.
    """
    stored = find_checkpoint(path)
    entries = read_checksums(stored.root)
    if not entries:
        yield Fault(CHECKSUMS, "is missing, so nothing says what the other files must be")
    read_meta(stored.root)
    total = sum(entry.bytes for entry in entries.values())
    yield from find_faults(stored.root, entries, lambda count: on_bytes(count, total))
    yield from _model_faults(stored)


def _model_faults(stored: Stored) -> Iterator[Fault]:
    from megatron_dapo.mcore.safe_load import refuse_foreign_pickles

    try:
        check_backend(stored.model)
        metadata = refuse_foreign_pickles(stored.model)
    except CheckpointError as error:
        yield Fault(str(stored.model.relative_to(stored.root)), f"cannot be loaded: {error}")
        return
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        file = stored.model / name
        size = file.stat().st_size if file.is_file() else -1
        if size < end:
            what = "is missing" if size < 0 else f"has {size} bytes, its tensors need {end}"
            yield Fault(str(file.relative_to(stored.root)), f"{what} (.metadata)")


def _summary(root: Path) -> tuple[str, str, str, str, str, str]:
    """step, saved, layout, model, size, checksums; what cannot be read is said where it would stand."""
    try:
        meta = read_meta(root)
        checksums = str(len(read_checksums(root)) or "none")
    except CheckpointError as error:
        return "?", "?", "?", str(error), _size(sum(file.stat().st_size for file in _files(root))), "?"
    model = meta.get("model", {})
    layout = {name.removesuffix("_size"): size for name, size in meta.get("layout", {}).items()}
    split = [f"{name.upper()}{size}" for name, size in layout.items() if name != "world" and size > 1]
    return (
        str(meta.get("step", "?")),
        str(meta.get("saved_at", "?")),
        f"{layout.get('world', '?')} ranks {' '.join(split)}".strip(),
        f"{model.get('family', '?')}, {model.get('num_layers', '?')} layers",
        _size(sum(file.stat().st_size for file in _files(root))),
        checksums,
    )


def _parts(metadata: Any) -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    """(model or optimizer's part, (tensors, numbers, bytes, types))."""
    rows: dict[str, list[Any]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if hasattr(entry, "size"):  # not of tensors: entries of bytes have no size
            # optimizer.state.exp_avg.decoder.... is a row "optimizer exp_avg"
            part = f"optimizer {key.split('.')[2]}" if key.startswith(_OPTIMIZER) else "model"
            rows.setdefault(part, []).append(entry)
    for name, entries in rows.items():
        numbers = sum(entry.size.numel() for entry in entries)
        size = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries)
        types = sorted({str(entry.properties.dtype).removeprefix("torch.") for entry in entries})
        yield name, (str(len(entries)), f"{numbers:,}", _size(size), ", ".join(types))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """{"layout": {"tp_size": 2}} -> ("layout.tp_size", 2)."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value
    else:
        yield META, "none: not written by megatron_dapo"


def _files(root: Path) -> Iterator[Path]:
    return (file for file in root.rglob("*") if file.is_file())


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
