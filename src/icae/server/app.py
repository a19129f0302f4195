"""HTTP around the service: the application, errors in OpenAI's form, health, metrics, the page."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from icae import __version__
from icae.errors import ICAEError, StorageError
from icae.model import ICAE
from icae.server import chat, contexts
from icae.server.door import Refused, Server, Tenant
from icae.server.keys import Keyring
from icae.server.limits import BodyLimit, Limits
from icae.server.scheduler import STORAGE
from icae.server.schemas import ErrorReply, Problem
from icae.store import SlotStore

log = logging.getLogger("icae.server")
PAGES = Path(__file__).parent / "page"
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def create_app(
    model: ICAE,
    store: SlotStore,
    *,
    name: str = "icae",
    limits: Limits | None = None,
    keyring: Keyring | None = None,
    open: bool = False,
    hosts: list[str] | None = None,
) -> FastAPI:
    """Make the application.

    Parameters
    ----------
    model : ICAE
        Owned by the app's scheduler while the app runs.
    store : SlotStore
        Where contexts are.
    name : str
        What the model is called to clients.
    limits : Limits, optional
        Sizes and times.
    keyring : Keyring, optional
        Who may come in; none: everybody, into the namespace of the command line.
    open : bool
        As long as the keyring never had a key, everybody may come in.
    hosts : list of str, optional
        Names that a request's Host header may have (against DNS rebinding); none: any.

    Returns
    -------
    FastAPI
        Its lifespan starts the scheduler, and at the end lets it finish what runs.
    """
    limits = limits or Limits()
    server = Server(model, store, name, limits, keyring, open)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.scheduler.start()
        yield
        await run_in_threadpool(server.scheduler.close, limits.shutdown)

    about = "Compress once, ask many times."
    app = FastAPI(title="icae", version=__version__, summary=about, lifespan=lifespan, docs_url=None, redoc_url=None)
    # FastAPI's own pages of documentation load scripts from another host: `_add_pages` has ours
    app.state.server = server
    app.include_router(contexts.router)
    app.include_router(chat.router)
    _add_pages(app, server)
    _add_errors(app)
    app.add_middleware(BodyLimit, max_body=limits.max_body)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(server.metrics.counting)
    return app


def _page(name: str) -> Response:
    """Return a page of ours, with a policy that lets it run its own script and style, and ask nobody but this server."""
    text = (PAGES / name).read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in found)

    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {hashes('script')}; style-src {hashes('style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


def _add_pages(app: FastAPI, server: Server) -> None:
    index, docs = _page("index.html"), _page("docs.html")

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return index

    @app.get("/docs", include_in_schema=False)
    def description() -> Response:
        return docs

    @app.get("/healthz", responses={503: {"model": ErrorReply}}, tags=["operation"])
    def healthz() -> dict[str, str]:
        """Tell whether requests are taken."""
        if not server.scheduler.alive:
            raise Refused(503, "the server is not taking requests")
        return {"status": "ok"}

    @app.get("/metrics", responses={401: {"model": ErrorReply}}, response_class=PlainTextResponse, tags=["operation"])
    def metrics(tenant: Tenant) -> Response:
        """Return the numbers that Prometheus collects."""
        return server.metrics.page()


def _error(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    reply = ErrorReply(error=Problem(message=message, type=kind, param=param, code=str(status)))
    return JSONResponse(reply.model_dump(), status, headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _error(error.status, error.message, error.param, error.headers)

    @app.exception_handler(StorageError)
    async def unkept(request: Request, error: StorageError) -> Response:
        log.error("%s", error)
        return _error(500, STORAGE)

    @app.exception_handler(ICAEError)
    async def mistake(request: Request, error: ICAEError) -> Response:
        return _error(getattr(error, "status", 400), str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = max(error.errors(), key=lambda e: len(e["loc"]))  # of a union's branches, the one that came furthest
        if first["type"] == "json_invalid":
            return _error(422, _plain(f"body: {first['msg']}: {first.get('ctx', {}).get('error', '')}"))
        named = [str(p) for p in first["loc"] if p not in ("body", "str") and str(p).isidentifier() or isinstance(p, int)]  # no type's name
        where = ".".join(named) or None
        if not named and first["type"] == "model_attributes_type" and "json" not in request.headers.get("content-type", ""):
            return _error(415, "send JSON, with the header Content-Type: application/json")
        return _error(422, _plain(f"{where or 'body'}: {first['msg']}"), where and _plain(where))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return _error(500, "the server made a mistake; it is in its log")


def _plain(text: str) -> str:
    """Return a text that any client can read: one line, without what UTF-8 cannot hold."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
