"""What all routes share: the server's parts, who may come in, how a request waits for its job, how it is refused."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from icae.catalogue import namespace_of
from icae.model import ICAE
from icae.server.keys import Keyring
from icae.server.limits import Limits
from icae.server.metrics import Metrics
from icae.server.scheduler import Closing, Failed, Full, Job, Scheduler
from icae.server.schemas import ErrorReply
from icae.server.service import Service
from icae.store import SlotStore


class Refused(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.headers, self.param = status, message, headers, param


class Server:
    """What the routes share."""

    def __init__(self, model: ICAE, store: SlotStore, name: str, limits: Limits, keyring: Keyring | None, open: bool = False):
        self.name, self.limits, self.keyring, self.open, self.started = name, limits, keyring, open, int(time.time())
        self.service = Service(model, store, limits)
        self.scheduler = Scheduler(model, max_rows=limits.max_rows, max_queue=limits.max_queue, guesses=limits.guesses)
        self.metrics = Metrics(self.scheduler, self.service)

    def submit(self, work: Any, tenant: str) -> tuple[Job, asyncio.Queue]:
        """Queue work and return the job with the queue of its events; a full queue is 429, a closing server 503."""
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(work, sink, tenant=tenant, timeout=self.limits.timeout)
        try:
            self.scheduler.submit(job)
        except Full as full:
            raise Refused(429, str(full), {"Retry-After": str(full.retry_after)}) from full
        except Closing as closing:
            raise Refused(503, str(closing), {"Retry-After": "10"}) from closing
        return job, events


async def next_event(request: Request, job: Job, events: asyncio.Queue) -> Any:
    """Return a job's next event; a client that has gone away cancels the job. Failures are raised as `Refused`."""
    while True:
        now = time.monotonic()
        if now > job.looked + 0.5:
            job.looked = now
            if await request.is_disconnected():
                job.cancel()
                raise Refused(499, "the client went away")
        try:
            event = await asyncio.wait_for(events.get(), 0.5)
        except TimeoutError:
            continue
        except BaseException:
            job.cancel()
            raise
        if isinstance(event, Failed):
            raise Refused(event.status, event.message)
        return event


def server_of(request: Request) -> Server:
    """Return the app's `Server`."""
    return request.app.state.server


_bearer = HTTPBearer(auto_error=False, description="An API key, as `icae serve --add-key NAME` printed it.")


def tenant_of(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    """Return the namespace of a request's key; on a server that is open and never had keys, that of the command line."""
    refuse_other_sites(request)
    server = server_of(request)
    keyring = server.keyring
    if keyring is None or (server.open and not keyring.made):
        return ""
    server.open = False  # once there were keys, taking the last one away lets nobody in
    name = keyring.check(given.credentials) if given is not None else None
    if name is None:
        raise Refused(401, "no valid API key; send it as 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"})
    return namespace_of(name)


def refuse_other_sites(request: Request) -> None:
    """Refuse what changes something and was sent by a page of another site: browsers send plain text and forms unasked (CSRF)."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    foreign = site not in ("same-origin", "none") if site else origin and urlsplit(origin).netloc != request.headers.get("host")
    if foreign:
        raise Refused(403, "this request comes from a page of another site")


Tenant = Annotated[str, Depends(tenant_of)]
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorReply} for code in (400, 401, 403, 404, 413, 415, 422, 429, 499, 500, 503, 504)
}
