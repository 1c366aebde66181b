"""A reward function that misbehaves on demand: what it does is the response's text."""

from __future__ import annotations

from pathlib import Path

import pytest

MISCHIEF = """
import ctypes, os, re, signal, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    what = solution_str
    if what == "raise":
        raise KeyError("no such thing")
    if what == "sleep for ever":
        time.sleep(3600)
    if what == "run away":  # in C code, with the interpreter lock held
        re.match("(a+)+$", "a" * 64 + "b")
    if what == "nan":
        return float("nan")
    if what == "none":
        return None
    if what == "exit":
        os._exit(7)
    if what == "sys.exit":
        sys.exit(3)
    if what == "kill itself":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "print":
        print("garbage" * 1000)
        os.write(1, bytes(range(256)) * 100)
        sys.stdout.flush()
    if what == "fail once":
        if not os.path.exists(extra_info["marker"]):
            open(extra_info["marker"], "w").close()
            raise RuntimeError("not yet")
    if what == "leave a child":
        child = subprocess.Popen(["sleep", "3600"])
        with open(extra_info["marker"], "w") as file:
            file.write(str(child.pid))
        time.sleep(3600)
    if what == "modules":
        return {"score": 1, "pred": " ".join(m for m in ("torch", "numpy", "megatron") if m in sys.modules)}
    if what == "no answer":
        return {"score": -1.0, "pred": "[INVALID]"}
    return {"score": 1.0, "acc": True, "pred": what, "length": len(what)}
"""


@pytest.fixture
def mischief(tmp_path: Path) -> str:
    """The path of the file."""
    path = tmp_path / "mischief.py"
    path.write_text(MISCHIEF)
    return str(path)
