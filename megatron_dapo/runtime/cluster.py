"""The address of a Ray cluster, tried before Ray is: where nobody listens Ray tries for minutes and ends the process.

Nothing here imports Ray.
"""

from __future__ import annotations

import socket

SECONDS = 10.0  # for an answer of the address

HINT = (
    "Start the cluster (docs/launch.md), correct runtime.address or RAY_ADDRESS, or unset both: the run then starts "
    "Ray on this machine alone"
)
LOGS = "Start again where the machine was busy; Ray's logs are in /tmp/ray/session_latest/logs"


class ClusterError(RuntimeError):
    """There is no Ray cluster to run on: names the address that was tried and what was found there."""


def check_answers(address: str) -> None:
    """Whether somebody listens at `address`, HOST:PORT. What Ray looks up itself (`auto`, `local`) is left to it.

    Raises:
        ClusterError: nobody does, or it is no such address.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ClusterError(
            f"{address!r} is no address of a Ray cluster. HOST:PORT of its head is wanted, such as 10.0.0.1:6379; the "
            f"dashboard's, http://10.0.0.1:8265, is for launch/submit.sh. {HINT}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}. {HINT}") from error
