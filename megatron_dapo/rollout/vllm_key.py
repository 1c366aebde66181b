"""Inside vLLM's server: nothing is answered without the key.

vLLM's own check (`--api-key`) leaves out the paths that load weights, run methods of its workers and stop it. It adds
this class to its application (`--middleware`). Standard library only: the server's process loads it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own: it then asks for the same key
MIDDLEWARE = f"{__name__}.RequireKey"

Application = Callable[[Mapping[str, Any], Callable[..., Any], Callable[..., Awaitable[None]]], Awaitable[None]]


class RequireKey:
    """An ASGI middleware."""

    def __init__(self, app: Application):
        self._app = app
        self._wanted = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(
        self, scope: Mapping[str, Any], receive: Callable[..., Any], send: Callable[..., Awaitable[None]]
    ) -> None:
        """`scope`: headers as pairs of bytes, names in lower case."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or secrets.compare_digest(given, self._wanted):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"the key of this server is wanted"})
        else:
            await send({"type": "websocket.close", "code": 1008})
