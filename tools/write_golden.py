"""`make golden`: the golden runs' base model and metric series into tests/data/golden, with their origin.

    python tools/write_golden.py              # the series, from the base model that is there
    python tools/write_golden.py --new-base   # the base model too: all numbers change

Besides the three settings it writes what must not pass for them: the full setting without clipping.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))

from small import GOLDEN, GOLDEN_SEED, SETTINGS, words, write_base, write_problems  # noqa: E402

from megatron_dapo.obs.summary import versions  # noqa: E402
from megatron_dapo.regression.golden import Golden, Origin, series_of  # noqa: E402

FOLDER = ROOT / "tests" / "data" / "golden"
BASE = FOLDER / "base"
# Name -> the setting it starts from, and what is wrong with it.
COUNTEREXAMPLES = {
    "unclipped": (
        "full",
        ("actor_rollout_ref.actor.clip_ratio_low=0.9999", "actor_rollout_ref.actor.clip_ratio_high=1e9"),
    ),
}
RUNS = {name: (name, ()) for name in SETTINGS} | COUNTEREXAMPLES


def golden_words(folder: Path, out: Path, setting: str) -> list[str]:
    """CONFIG.yaml and overrides of a golden run; its problems are written into `folder`."""
    write_problems(folder, GOLDEN_SEED)
    return [*words(BASE, folder, out, setting, GOLDEN_SEED), *GOLDEN]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-base", action="store_true", help="warm up a new base model first")
    arguments = parser.parse_args()
    if changed := _changed_files():
        print(f"write_golden: not committed, so no commit names these numbers' code: {changed}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.new_base or not BASE.exists():
            print("warming up the base model", flush=True)
            write_base(BASE, write_problems(folder, GOLDEN_SEED), GOLDEN_SEED)
        for name, (setting, extra) in RUNS.items():
            _run(golden_words(folder, folder / name, setting) + list(extra))
            Golden(_origin((*GOLDEN, *SETTINGS[setting], *extra)), series_of(folder / name)).write(
                FOLDER / f"{name}.json"
            )
            print(f"written: {FOLDER / name}.json", flush=True)
    return 0


def _run(words: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_dapo", "train", *words]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def _origin(overrides: tuple[str, ...]) -> Origin:
    return Origin(
        commit=_git("rev-parse", "HEAD"),
        versions=versions(),
        overrides=overrides,
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        date=time.strftime("%Y-%m-%d"),
    )


def _changed_files() -> str:
    """Tracked files that differ from the commit, but for the golden ones themselves."""
    return _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{FOLDER.relative_to(ROOT)}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
