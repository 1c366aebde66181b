"""An address is tried before Ray is; `functional/test_ray.py` has a whole run."""

from __future__ import annotations

import socket

import pytest

from megatron_dapo.runtime.cluster import ClusterError, check_answers


@pytest.fixture
def port() -> int:
    """That nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_an_address_where_somebody_listens_is_left_to_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_answers(f"127.0.0.1:{port}")
        check_answers(f"ray://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["auto", "local"])
def test_what_ray_finds_itself_is_left_to_it(address: str) -> None:
    check_answers(address)


def test_an_address_where_nobody_listens_is_told_with_what_was_found(port: int) -> None:
    with pytest.raises(ClusterError, match=rf"no Ray cluster answers at 127.0.0.1:{port}: .*refused. Start the"):
        check_answers(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["10.0.0.1", "http://10.0.0.1:8265", "10.0.0.1:", ":6379", "garbage"])
def test_what_is_no_address_is_told_with_what_is_wanted(address: str) -> None:
    with pytest.raises(ClusterError, match=rf"'{address}' is no address of a Ray cluster. HOST:PORT of its head"):
        check_answers(address)
