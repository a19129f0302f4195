"""Routes of contexts and of the served model."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from icae.catalogue import Entry
from icae.data import decoded
from icae.errors import ICAEError
from icae.server.door import ERRORS, Refused, Tenant, next_event, server_of
from icae.server.schemas import Context, ContextList, ContextRequest, Deleted, Reading

router = APIRouter(prefix="/v1", responses=ERRORS)


def _shown(entry: Entry, cached: bool | None = None) -> Context:
    about = entry.about
    return Context(
        id=entry.id,
        name=entry.name,
        tokens=entry.tokens,
        slots=entry.slots,
        segments=entry.segments,
        bytes=entry.bytes,
        created=int(entry.made),
        kind=about["kind"],
        ratio=about["ratio"],
        cached=cached,
    )


_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": ContextRequest.model_json_schema()},
        "text/plain": {"schema": {"type": "string"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary"}, "name": {"type": "string"}, "ratio": {"type": "integer"}},
            }
        },
    },
}


async def _context_request(request: Request) -> ContextRequest:
    """Read a text from JSON, from plain text, or from an uploaded file; its name is a label and never a path."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return ContextRequest.model_validate_json(await request.body())
        if kind == "text/plain":
            return ContextRequest(text=decoded(await request.body(), "the text"), name=None, ratio=None)
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=4) as form:
                file = form.get("file")
                if file is None or isinstance(file, str):
                    raise Refused(422, "the upload has no part named 'file'", param="file")
                name = form.get("name") or re.sub(r"[^\w .()+-]", "_", file.filename or "upload")[:400]
                values = {"text": decoded(await file.read(), "the text"), "name": name, "ratio": form.get("ratio")}
                return ContextRequest.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False, include_url=False)) from error
    except ICAEError as error:
        raise Refused(422, str(error), param="text") from error
    except HTTPException as error:
        raise Refused(422, "the upload is not readable as multipart/form-data") from error
    raise Refused(415, "send a context as application/json, text/plain or multipart/form-data")


@router.post("/contexts", openapi_extra={"requestBody": _BODY}, tags=["contexts"])
async def add_context(request: Request, tenant: Tenant) -> Context:
    """Compress a text, once; what is known already comes back at once."""
    server, wanted = server_of(request), await _context_request(request)
    ids = await run_in_threadpool(server.service.encode, wanted.text)
    job, events = server.submit(server.service.compress(tenant, ids, wanted.name, wanted.ratio, "http"), tenant)
    entry, cached = (await next_event(request, job, events)).value
    server.metrics.contexts.inc()
    return _shown(entry, cached)


@router.get("/contexts", tags=["contexts"])
def list_contexts(request: Request, tenant: Tenant) -> ContextList:
    """List the contexts of this key."""
    return ContextList(data=[_shown(e) for e in server_of(request).service.store.entries(tenant)])


@router.get("/contexts/{id}", tags=["contexts"])
def show_context(id: str, request: Request, tenant: Tenant) -> Context:
    """Tell what a context is."""
    return _shown(server_of(request).service.find(tenant, id))


@router.get("/contexts/{id}/reading", tags=["contexts"])
async def read_context(
    id: str, request: Request, tenant: Tenant, segments: Annotated[int, Query(ge=1, le=64, description="Segments, from the first on.")] = 16
) -> Reading:
    """Read a context back from its slots, token by token."""
    server = server_of(request)
    job, events = server.submit(server.service.reading(tenant, id, segments), tenant)
    return (await next_event(request, job, events)).value


@router.delete("/contexts/{id}", tags=["contexts"])
def delete_context(id: str, request: Request, tenant: Tenant) -> Deleted:
    """Take a context away; its slots go with the last key that has the same text."""
    server_of(request).service.delete(tenant, id)
    return Deleted(id=id)


@router.get("/models", tags=["models"])
def list_models(request: Request, tenant: Tenant) -> dict[str, Any]:
    """List the one model that is served."""
    server = server_of(request)
    model = {"id": server.name, "object": "model", "created": server.started, "owned_by": "icae"}
    return {"object": "list", "data": [{**model, "max_model_len": server.service.model.base.max_positions}]}
