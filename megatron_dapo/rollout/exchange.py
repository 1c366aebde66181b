"""Talking JSON over HTTP with an engine's server: one call and its answer, or many requests in flight at once.

Threads that wait for the server send the requests, `threads` of them at a time; the others wait in a queue here. An
answer is taken from `arrived`, which sleeps until there is one.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron_dapo.rollout.server_process import HOST, ServerProcess

Key = TypeVar("Key")


class RefusedError(RuntimeError):
    """The server answered with an error."""


@dataclass(frozen=True)
class Arrival(Generic[Key]):
    """What became of one request: `answer` is what the server said, or the exception in place of it."""

    key: Key
    answer: Any


class Exchange(Generic[Key]):
    def __init__(self, server: ServerProcess, threads: int):
        self._server = server
        self._unsent: queue.SimpleQueue[tuple[Key, str, Any]] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Arrival[Key]] = queue.SimpleQueue()
        self._count = 0
        self._threads, self._started = threads, 0

    @property
    def in_flight(self) -> int:
        """Requests sent or to be sent whose arrival was not taken."""
        return self._count

    def call(self, path: str, body: Any, limit: float) -> Any:
        """POST `body` and wait for the answer, `limit` seconds at most.

        Raises:
            EngineFailedError: the server died or did not answer in time.
            RefusedError: it answered with an error.
        """
        try:
            return self._post(path, body, limit)
        except (OSError, http.client.HTTPException) as error:
            raise self._server.failure(error) from error

    def send(self, key: Key, path: str, body: Any) -> None:
        """POST `body` when a thread is free; the answer comes through `arrived`."""
        self._count += 1
        self._unsent.put((key, path, body))
        if self._started < min(self._threads, self._count):
            self._started += 1
            # Daemons: a process that ends does not wait for a server.
            threading.Thread(target=self._work, name=f"engine request {self._started}", daemon=True).start()

    def arrived(self, wait: float) -> list[Arrival[Key]]:
        """All arrivals not taken yet; where there is none, the next one within `wait` seconds."""
        found: list[Arrival[Key]] = []
        try:
            if self._count:
                found.append(self._arrived.get(timeout=wait))
            while True:
                found.append(self._arrived.get_nowait())
        except queue.Empty:
            self._count -= len(found)
            return found

    def drop_unsent(self) -> None:
        """Forget the requests that no thread has taken."""
        try:
            while True:
                self._unsent.get_nowait()
                self._count -= 1
        except queue.Empty:
            return

    def _work(self) -> None:
        while True:
            key, path, body = self._unsent.get()
            try:
                answer = self._post(path, body, None)
            except (OSError, http.client.HTTPException, RefusedError) as error:
                answer = error
            self._arrived.put(Arrival(key, answer))

    def _post(self, path: str, body: Any, limit: float | None) -> Any:
        connection = http.client.HTTPConnection(HOST, self._server.port, timeout=limit)
        try:
            headers = {**self._server.spec.headers, "Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status >= 400:
            said = text.decode(errors="replace")[:1000]
            raise RefusedError(f"{self._server.spec.name} refused {path}: status {response.status}, {said}")
        try:
            return json.loads(text) if text else None
        except json.JSONDecodeError:
            return text.decode(errors="replace")
