"""What one server takes on: sizes, times and numbers, and the gate that holds request bodies to them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from icae.config import setting
from icae.errors import ICAEError


@dataclass(frozen=True)
class Limits:
    """Every default once; each field's sentence is shown by `icae serve --limit help`."""

    max_rows: int = setting(16, "Rows that the model works on at once; an answer has one, while it is begun in several ways as many.")
    guesses: int = setting(
        8, "Tokens that a request guesses ahead at each step, from what was said before, at most; answers stay the same. 0: none."
    )
    max_queue: int = setting(64, "Requests of one key that may wait; past it: 429.")
    max_body: int = setting(16 << 20, "Bytes of a request body, at most.")
    max_context: int = setting(200_000, "Tokens of a text to compress, and of all contexts of a chat together, at most.")
    max_messages: int = setting(256, "Messages of a chat, at most.")
    prefix_bytes: int = setting(1 << 30, "Memory for keys and values of contexts asked lately.")
    slot_bytes: int = setting(1 << 30, "Memory for slots of long contexts asked lately: each prompt is about another part of them.")
    store_bytes: int | None = setting(None, "Keep the store within this many bytes, dropping what was used longest ago; none: no bound.")
    timeout: float = setting(600.0, "Seconds a request may take, waiting included.")
    shutdown: float = setting(60.0, "Seconds to finish what runs when the server is stopped.")
    max_tokens: int = setting(256, "Tokens of a response where a request names no number.")

    def __post_init__(self) -> None:
        """Check that everything is positive, or where nothing is allowed, not negative."""
        for field in dataclasses.fields(self):
            value, may_be_0 = getattr(self, field.name), field.name == "guesses"
            if value is not None and not (0 < value < math.inf or may_be_0 and value == 0):
                raise ICAEError(f"{field.name} must be {'at least' if may_be_0 else 'more than'} 0, and finite, got {value}")


class BodyLimit:
    """ASGI gate: a request body past `max_body` bytes is answered with 413, whatever length it claims."""

    def __init__(self, app: Any, max_body: int):
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        claimed = dict(scope["headers"]).get(b"content-length", b"0")
        if claimed.isdigit() and int(claimed) > self.max_body:
            await self._refuse(send)
            return
        read, started = 0, False

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise _TooLarge
            return message

        async def noted(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if not started:
                await self._refuse(send)

    async def _refuse(self, send: Any) -> None:
        message = f"the request is larger than {self.max_body} bytes; send a smaller one"
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "413"}
        body = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _TooLarge(BaseException):
    """Not an `Exception`, so that no handler of body errors turns it into something else on its way out."""
