"""These tests need an engine's own environment (`make test-engines`); without its library they are not collected."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [f"test_{library}.py" for library in ("sglang",) if find_spec(library) is None]
