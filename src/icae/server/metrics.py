"""Numbers for Prometheus: counted here, read from scheduler and service when they are asked for."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

from icae.server.scheduler import Scheduler
from icae.server.schemas import Usage
from icae.server.service import Service

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """One server's numbers, in a registry of their own."""

    def __init__(self, scheduler: Scheduler, service: Service):
        self.registry = r = CollectorRegistry()
        self.requests = Counter("icae_requests", "Answered requests.", ["method", "status"], registry=r)
        self.seconds = Histogram("icae_request_seconds", "From request to the end of its answer.", buckets=_SECONDS, registry=r)
        self.first = Histogram("icae_first_token_seconds", "From request to the first token.", buckets=_SECONDS, registry=r)
        self.tokens = Counter("icae_tokens", "Tokens read, generated, and saved by slots.", ["kind"], registry=r)
        self.contexts = Counter("icae_contexts_added", "Contexts that clients added.", registry=r)
        for name, help, read in (
            ("icae_queue", "Jobs that wait.", lambda: scheduler.queued),
            ("icae_active", "Jobs under way.", lambda: scheduler.active),
            ("icae_steps", "Steps of the batch so far.", lambda: scheduler.steps),
            ("icae_step_rows", "Rows of all steps so far; over icae_steps: the mean batch size.", lambda: scheduler.step_rows),
            ("icae_prefix_bytes", "Memory of contexts asked lately.", lambda: service.prefixes.bytes),
            ("icae_slot_bytes", "Memory of long contexts' slots asked lately.", lambda: service.whole.bytes),
            ("icae_prefix_hits", "Contexts found in memory so far.", lambda: service.prefixes.hits),
            ("icae_prefix_misses", "Contexts read from the store so far.", lambda: service.prefixes.misses),
        ):
            Gauge(name, help, registry=r).set_function(read)

    def used(self, usage: Usage) -> None:
        """Count a finished generation's tokens."""
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("completion").inc(usage.completion_tokens)
        self.tokens.labels("saved").inc(max(0, usage.icae.saved_tokens))

    def page(self) -> Response:
        """Return all numbers in Prometheus' text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def counting(self, app: Any) -> Any:
        """Wrap an ASGI application so that its requests are counted."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            begin, status = time.monotonic(), "none"

            async def noted(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            try:
                await app(scope, receive, noted)
            finally:
                method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE") else "other"
                self.requests.labels(method, status).inc()
                self.seconds.observe(time.monotonic() - begin)

        return counted
