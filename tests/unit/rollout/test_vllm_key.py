"""The key before vLLM's application, as an ASGI server calls it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from megatron_dapo.rollout.vllm_key import KEY_VARIABLE, RequireKey


def answer_of(monkeypatch: pytest.MonkeyPatch, scope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    monkeypatch.setenv(KEY_VARIABLE, "right")
    sent: list[Mapping[str, Any]] = []

    async def app(scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "from the application"})

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(RequireKey(app)(scope, None, send))
    return sent


@pytest.mark.parametrize("headers", [[], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"right")]])
def test_a_request_without_the_key_never_reaches_the_application(
    monkeypatch: pytest.MonkeyPatch, headers: list[tuple[bytes, bytes]]
) -> None:
    sent = answer_of(monkeypatch, {"type": "http", "path": "/health", "headers": headers})
    assert sent[0]["status"] == 401
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    (closed,) = answer_of(monkeypatch, {"type": "websocket", "path": "/v1/realtime", "headers": headers})
    assert closed["type"] == "websocket.close"


def test_a_request_with_the_key_and_what_is_no_request_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with_key = {"type": "http", "path": "/health", "headers": [(b"authorization", b"Bearer right")]}
    for scope in (with_key, {"type": "lifespan"}):
        assert answer_of(monkeypatch, scope) == [{"type": "from the application"}]
