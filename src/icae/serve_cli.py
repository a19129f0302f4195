"""`icae serve`: the HTTP server on the command line. Heavy imports inside the command."""

from __future__ import annotations

import copy
import dataclasses
import ipaddress
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from icae.errors import ICAEError
from icae.terminal import BaseDtype, BaseName, Beginnings, Device, Focus, Grounding, Model, Polish, StoreFolder, load_model, name_of


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on; any but this machine's own needs API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0: any free one.", min=0, max=65535)] = 8000,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    polish: Polish = None,
    focus: Focus = None,
    grounding: Grounding = None,
    beginnings: Beginnings = None,
    store: StoreFolder = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What the model is called to clients.", show_default="the checkpoint's")
    ] = None,
    add_key: Annotated[
        str | None,
        typer.Option(
            "--add-key",
            help="Make an API key of this name, print it once, and exit; with --remove-key of the same name, instead of its old ones.",
        ),
    ] = None,
    remove_key: Annotated[str | None, typer.Option("--remove-key", help="Take the API keys of this name away, and exit.")] = None,
    limit: Annotated[
        list[str] | None, typer.Option("--limit", help="A limit as name=value, such as max_rows=8; `--limit help` lists them.")
    ] = None,
) -> None:
    """Serve contexts and chat over HTTP, in OpenAI's form, with a page to try it."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ICAEError(f"the server needs more packages ({error.name} is missing); pip install 'icae[serve]'") from error
    from icae.server.keys import KEYS, Keyring
    from icae.server.limits import Limits

    if limit == ["help"]:
        for field in dataclasses.fields(Limits):
            print(f"{field.name:14} {field.default!s:12} {field.metadata['help']}")
        return
    limits = _limits(Limits, limit or [])
    folder = _folder(store)
    keyring = Keyring(folder / KEYS)
    if add_key is not None:
        if remove_key not in (None, add_key):
            raise ICAEError(
                "--add-key and --remove-key of two names go one at a time; of one name, they put a new key in its old ones' place"
            )
        print(keyring.add(add_key, alone=remove_key is not None))
        return
    if remove_key is not None:
        print(f"removed {keyring.remove(remove_key)} keys", file=sys.stderr)
        return
    open_to_all = not keyring.made
    if open_to_all and not _own(host):
        raise ICAEError(f"nobody listens on {host} without API keys: make one with `icae serve --add-key NAME`, or use --host 127.0.0.1")
    from icae.checkpoint import find_checkpoint
    from icae.server.app import create_app
    from icae.store import SlotStore

    checkpoint = find_checkpoint(model)
    kept = SlotStore(folder)
    _check_free(host, port)
    icae = load_model(str(checkpoint), base, device, base_dtype, polish=polish, focus=focus, grounding=grounding, beginnings=beginnings)
    hosts = [host, "localhost", "127.0.0.1", "[::1]", "::1"] if _own(host) else None
    app = create_app(icae, kept, name=name or name_of(model), limits=limits, keyring=keyring, open=open_to_all, hosts=hosts)
    shutdown = int(limits.shutdown) + 1
    log = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log["handlers"]["access"]["stream"] = "ext://sys.stderr"  # as all that is told beside results
    uvicorn.run(app, host=host, port=port, log_config=log, log_level="info", timeout_graceful_shutdown=shutdown, server_header=False)


def _check_free(host: str, port: int) -> None:
    """Raise `ICAEError` where nobody can listen, before a model is loaded."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ICAEError(f"cannot listen at {host}, port {port}: {error.strerror or error}; --port 0 takes any free one") from error


def _folder(store: Path | None) -> Path:
    from icae.base import cache_folder

    return store if store is not None else cache_folder() / "store"


def _own(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _limits(kind: Any, pairs: list[str]) -> Any:
    """Return the limits with `name=value` pairs put over the defaults."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, float] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if name not in known or not sign:
            raise ICAEError(f"limit {pair!r} is not name=value with a name out of {', '.join(known)}")
        try:
            values[name] = float(value) if isinstance(known[name].default, float) else int(value)
        except ValueError:
            whole = "" if isinstance(known[name].default, float) else "whole "
            raise ICAEError(f"limit {name} must be a {whole}number, got {value!r}") from None
    return kind(**values)
