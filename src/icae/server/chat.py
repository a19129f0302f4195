"""Routes that generate, in OpenAI's form: chats and completions, whole or as a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from icae.reader import Sampling
from icae.server.door import ERRORS, Refused, Server, Tenant, next_event, server_of
from icae.server.scheduler import Done, Token
from icae.server.schemas import ChatRequest, CompletionRequest, Generation, Usage
from icae.server.service import Ask, Speech

router = APIRouter(prefix="/v1", responses=ERRORS, tags=["generation"])
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, chunks of it as server-sent events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/chat/completions", responses=_STREAM, response_class=Response)
async def chat(body: ChatRequest, request: Request, tenant: Tenant) -> Response:
    """Answer a chat; parts of type `context` are read as memory slots."""
    server = server_of(request)
    _served(server, body)
    ask = await run_in_threadpool(server.service.chat, tenant, body.messages)
    return await _answer(request, server, tenant, ask, body, body.max_completion_tokens or body.max_tokens, _Chat(server.name))


@router.post("/completions", responses=_STREAM, response_class=Response)
async def complete(body: CompletionRequest, request: Request, tenant: Tenant) -> Response:
    """Continue a text, or the context that is named."""
    server = server_of(request)
    _served(server, body)
    ask = await run_in_threadpool(server.service.completion, tenant, body.prompt, body.context_id)
    return await _answer(request, server, tenant, ask, body, body.max_tokens, _Completion(server.name))


class _Completion:
    """The form of a completion."""

    kind, stream_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str):
        self.about = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def choice(self, text: str, reason: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def delta(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def whole(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        return {**self.about, "object": self.kind, "choices": [self.choice(text, reason)], "usage": usage.model_dump()}

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> str:
        values = {**self.about, "object": self.stream_kind, "choices": choices}
        if usage is not None:
            values["usage"] = usage.model_dump()
        return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


class _Chat(_Completion):
    """The form of a chat's answer."""

    kind, stream_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def opening(self) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def delta(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": reason}


def _served(server: Server, body: Generation) -> None:
    if body.model is not None and body.model != server.name:
        raise Refused(404, f"no model of that name; this server has {server.name!r}", param="model")


async def _answer(
    request: Request, server: Server, tenant: str, ask: Ask, body: Generation, limit: int | None, form: _Completion
) -> Response:
    """Queue a generation, and answer with it as a whole or as a stream."""
    begun, usage = time.monotonic(), Usage()
    sampling = Sampling(body.temperature or 0.0, body.top_p or 1.0, body.seed)
    beginnings = (1 if body.stream else 0) if body.beginnings is None else body.beginnings
    job, events = server.submit(server.service.generate(tenant, ask, limit, sampling, usage, beginnings), tenant)
    speech = Speech(server.service.model.base, [body.stop] if isinstance(body.stop, str) else body.stop or [])
    first = await next_event(request, job, events)
    server.metrics.first.observe(time.monotonic() - begun)

    async def pieces() -> AsyncGenerator[tuple[str, str | None], None]:
        """Yield (new text, why it ended or none); the last one has a reason."""
        event, ids = first, []
        try:
            while True:
                last = isinstance(event, Done)
                if isinstance(event, Token):
                    ids = event.ids
                new = speech.hear(ids, last)
                usage.completion_tokens = len(ids)
                usage.total_tokens = usage.prompt_tokens + len(ids)
                if last or speech.stopped:
                    yield new, "stop" if speech.stopped else event.value
                    return
                if new:
                    yield new, None
                event = await next_event(request, job, events)
        finally:
            job.cancel()
            server.metrics.used(usage)

    if not body.stream:
        text, reason = "", "stop"
        async for new, why in pieces():
            text, reason = text + new, why or reason
        return JSONResponse(form.whole(text, reason, usage))

    async def stream() -> AsyncIterator[str]:
        parts = pieces()
        try:
            if opening := form.opening():
                yield form.chunk(opening)
            async for new, why in parts:
                if new:
                    yield form.chunk([form.delta(new, None)])
                if why is not None:
                    yield form.chunk([form.delta("", why)])
            if body.stream_options is not None and body.stream_options.include_usage:
                yield form.chunk([], usage)
            yield "data: [DONE]\n\n"
        except Refused as error:  # the status line is sent already: the error goes into the stream
            yield f"data: {json.dumps({'error': {'message': error.message, 'type': 'server_error', 'code': str(error.status)}})}\n\n"
        finally:
            await parts.aclose()
            job.cancel()

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
