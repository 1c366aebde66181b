"""What stands between a run and its engine's server: the server ends with the run, however the run ends.

    python server_guard.py LIFELINE COMMAND...

The first of a process group, it starts COMMAND in that group and waits for it. LIFELINE is the reading end of a pipe
whose other end the run holds: it closes when the run is gone, a kill included, and the whole group is then killed.
Run as a file, by an interpreter that imports nothing else: it costs some megabytes and starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    lifeline = int(sys.argv[1])
    server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_the_run, args=(lifeline,), daemon=True).start()
    code = server.wait()
    return code if code >= 0 else 128 - code


def _end_with_the_run(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written: it returns when the other end is closed
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
