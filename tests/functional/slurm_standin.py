"""Stand-ins for Slurm's sbatch, srun and scontrol, whose nodes are loopback addresses of this machine.

What a batch script sees of Slurm is kept: it runs as a copy in a spool folder, in a session of its own, with Slurm's
variables; srun passes signals on to its tasks and answers with the worst of their exit codes; a requeued job runs again
under its number. Left out: queues, limits, and what srun's options do to a task. `install` puts the three on a PATH;
their state is in STANDIN_DIR.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol")
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # of those that srun forwards


def install(directory: Path) -> dict[str, str]:
    """Put the commands into `directory`; returns the environment in which they are found."""
    commands = directory / "bin"
    commands.mkdir(parents=True)
    for name in COMMANDS:
        path = commands / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)
    return os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "STANDIN_DIR": str(directory)}


def calls(directory: Path) -> list[list[str]]:
    """The words of every call so far."""
    return [json.loads(line) for line in (directory / "calls").read_text().splitlines()]


def tasks(directory: Path) -> list[int]:
    """Process ids of all tasks that srun has started so far."""
    return [int(line) for line in (directory / "tasks").read_text().split()]


def sbatch(state: Path, words: Sequence[str]) -> int:
    """Run the job here and now, again for each requeue; returns its last exit code."""
    given, (script, *arguments) = split_options(words)
    directives = re.findall(r"^#SBATCH (--\S+)$", Path(script).read_text(), re.MULTILINE)
    options = split_options(directives)[0] | given
    job = state.name.removeprefix("job_")
    copy = state / "spool" / "slurm_script"
    copy.parent.mkdir()
    shutil.copy(script, copy)
    restarts = 0
    while True:
        environment = job_environment(job, options, restarts)
        process = subprocess.Popen([copy, *arguments], env=environment, start_new_session=True)
        (state / "batch").write_text(str(process.pid))
        code = process.wait()
        if not (state / "requeued").exists():
            return code if code >= 0 else 128 - code
        if "requeue" not in options:
            raise RuntimeError("the job asks to be requeued and was not submitted with --requeue")
        (state / "requeued").unlink()
        restarts += 1


def job_environment(job: str, options: dict[str, str], restarts: int) -> dict[str, str]:
    nodes = int(options["nodes"])
    return os.environ | {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * int(options["ntasks-per-node"])),
        "SLURM_JOB_NODELIST": f"127.0.0.[2-{1 + nodes}]",
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_GPUS_ON_NODE": options["gpus-per-node"],
        **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
    }


def srun(state: Path, words: Sequence[str]) -> int:
    options, command = split_options(words)
    allocated = hostnames(os.environ["SLURM_JOB_NODELIST"])
    names = hostnames(options["nodelist"]) if "nodelist" in options else allocated[: int(options["nodes"])]
    wanted = int(options.get("ntasks", os.environ["SLURM_NTASKS"]))  # a step inherits the job's
    if wanted != len(names) * int(options["ntasks-per-node"]):
        raise ValueError(f"{wanted} tasks are asked for on {len(names)} nodes")
    started: list[subprocess.Popen[bytes]] = []
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: [task.send_signal(number) for task in started])
    for name in names:
        environment = os.environ | {"SLURMD_NODENAME": name, "SLURM_NODEID": str(allocated.index(name))}
        with open(options["output"].replace("%N", name), "ab") if "output" in options else sys.stdout as out:
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True))
        with (state / "tasks").open("a") as log:
            log.write(f"{started[-1].pid}\n")
    return max(code if code >= 0 else 128 - code for code in [task.wait() for task in started])


def scontrol(state: Path, words: Sequence[str]) -> int:
    match words:
        case ["show", "hostnames", names]:
            print("\n".join(hostnames(names)))
        case ["show", "job", "-o", job]:
            cancelled = (state / "cancelled").exists()
            print(f"JobId={job} JobName=dapo_32b JobState={'CANCELLED' if cancelled else 'RUNNING'} Reason=None")
        case ["requeue", _]:
            (state / "requeued").touch()
            os.kill(int((state / "batch").read_text()), signal.SIGTERM)
        case _:
            raise ValueError(f"not in this stand-in: scontrol {' '.join(words)}")
    return 0


def hostnames(names: str) -> list[str]:
    """`n[2-3]` -> n2, n3."""
    match = re.fullmatch(r"(.*)\[(\d+)-(\d+)\]", names)
    return [names] if match is None else [f"{match[1]}{n}" for n in range(int(match[2]), int(match[3]) + 1)]


def split_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The leading --name=value and --flag words, and the rest."""
    count = next((i for i, word in enumerate(words) if not word.startswith("--")), len(words))
    options = [word.removeprefix("--").partition("=") for word in words[:count]]
    return {name: value for name, _, value in options}, list(words[count:])


def main() -> int:
    name, *words = sys.argv[1:]
    state = Path(os.environ["STANDIN_DIR"])
    with (state / "calls").open("a") as log:
        log.write(json.dumps([name, *words]) + "\n")
    return {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[name](state, words)


if __name__ == "__main__":
    sys.exit(main())
