"""The client's side of a request: noticing that it went away, and server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from meshloom.core.errors import MeshloomError
from meshloom.serve.api.errors import APIError


class DisconnectedError(Exception):
    """The client closed the connection before its answer was complete."""


async def unless_disconnected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects. The request's body must have been read.

    Raises:
        DisconnectedError: the client went away first.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise DisconnectedError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI response: one `data:` line per event, then `[DONE]`.

    On disconnect `events` is closed, which aborts the work behind it.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]):
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(DisconnectedError):
            await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async def line(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        async with contextlib.aclosing(self._events) as events:
            try:
                async for event in events:
                    await line(json.dumps(event, ensure_ascii=False, separators=(",", ":")))
            except MeshloomError as error:  # too late for a status code
                await line(json.dumps(APIError(500, str(error)).body))
        await line("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
