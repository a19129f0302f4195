"""`icae store ...`: the slot store on the command line. Heavy imports inside the commands, as in cli.py."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icae.catalogue import namespace_of
from icae.errors import ICAEError, StorageError
from icae.segments import check_ratio
from icae.terminal import (
    BaseDtype,
    BaseName,
    Device,
    Json,
    Key,
    Model,
    Polish,
    Ratio,
    StoreFolder,
    load_model,
    open_store,
    print_table,
    progress,
    say,
)

if TYPE_CHECKING:
    from icae.catalogue import Entry
    from icae.store import SlotStore

app = typer.Typer(help="Keep contexts compressed: once written, asked many times.", no_args_is_help=True)

Names = Annotated[list[str], typer.Argument(help="Names of contexts.", show_default=False)]
_TEXTS = (".txt", ".md", ".rst", ".text")


@app.command()
def add(
    sources: Annotated[list[str], typer.Argument(help="Text files, folders of them, or '-' for standard input.", show_default=False)],
    name: Annotated[str | None, typer.Option("--name", help="Name of a single text.", show_default="its path")] = None,
    ratio: Ratio = None,
    dtype: Annotated[str, typer.Option("--dtype", help="How slots are kept: float16, bfloat16, float32 or int8.")] = "float16",
    blobs: Annotated[str | None, typer.Option("--blobs", help="For a new store: folder or fsspec URL of the slots.")] = None,
    polish: Polish = None,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    key: Key = "",
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Compress texts into the store; what is there unchanged is not compressed again."""
    check_ratio(ratio)
    texts = list(_texts(sources))
    if not texts:
        raise ICAEError(f"nothing in {' '.join(sources)} is a text to compress")
    if name is not None:
        if len(texts) != 1:
            raise ICAEError(f"--name names one text, these are {len(texts)}; leave it away")
        texts = [dataclasses.replace(texts[0], name=name)]
    kept = open_store(store, blobs, make=True)
    _check_key(kept, key)
    icae = load_model(model, base, device, base_dtype, polish=polish)
    rows = []
    for t in texts:
        begin = time.perf_counter()
        try:
            with progress(f"compressing {t.name}") as tick:
                added = kept.add(
                    icae, t.text, t.name, source=t.source, ratio=ratio, dtype=dtype, namespace=namespace_of(key), progress=tick
                )
        except StorageError:
            raise
        except ICAEError as error:
            if not t.found:
                raise
            say(f"left out: {t.source!r}: {error}")
            continue
        row = {**_row(added.entry), "fresh": added.fresh, "seconds": time.perf_counter() - begin}
        rows.append(row)
        if not as_json:
            print(f"{t.name}: {row['tokens']} tokens, {row['slots']} slots, {added.fresh} of {row['chapters']} chapters new")
    if not rows:
        raise ICAEError(f"nothing in {' '.join(sources)} is a text to compress")
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))


@app.command()
def ls(key: Key = "", store: StoreFolder = None, as_json: Json = False) -> None:
    """List the contexts in the store."""
    rows = [_row(e) for e in open_store(store).entries(namespace_of(key))]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for r in rows:
        r["kind"], r["last used"] = f"{r['about']['kind']} {r['about']['dtype']}", _date(r["used"])
    print_table(["name", "tokens", "slots", "kind", "bytes", "last used"], rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a context.", show_default=False)],
    key: Key = "",
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Tell all that the store knows of a context."""
    row = _row(open_store(store).entry(name, namespace_of(key)))
    if as_json:
        print(json.dumps(row, ensure_ascii=False))
        return
    about = row.pop("about")
    for field, value in {**row, "made": _date(row["made"]), "used": _date(row["used"]), **about}.items():
        print(f"{field:18} {value}")


@app.command()
def rm(names: Names, key: Key = "", store: StoreFolder = None, as_json: Json = False) -> None:
    """Take contexts out of the store; slots that another name needs stay."""
    kept = open_store(store)
    for name in names:
        kept.entry(name, namespace_of(key))
    for name in dict.fromkeys(names):
        kept.remove(name, namespace_of(key))
    print(json.dumps({"removed": list(dict.fromkeys(names))}) if as_json else f"removed {', '.join(dict.fromkeys(names))}")


@app.command()
def verify(
    drop: Annotated[bool, typer.Option("--drop", help="Take damaged contexts away, so that adding makes them anew.")] = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Read everything in the store and check it; exits with 1 where something is damaged and was not dropped."""
    with progress("verifying", "blobs") as tick:
        bad = open_store(store).verify(drop=drop, progress=tick)
    if as_json:
        print(json.dumps({"damaged": bad, "dropped": drop}, ensure_ascii=False))
    else:
        for b in bad:
            print(f"{', '.join(b['names']) or 'no name'}: {b['problem']}")
        print(f"{len(bad)} damaged{', dropped' if bad and drop else ''}" if bad else "all is well")
    if bad and not drop:
        raise typer.Exit(1)


@app.command()
def gc(
    max_bytes: Annotated[int | None, typer.Option("--max-bytes", help="Keep at most this much; what was used longest ago goes.")] = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Clear away what nothing names, and keep the store within a size."""
    done = open_store(store).gc(max_bytes)
    if as_json:
        print(json.dumps(done, ensure_ascii=False))
    else:
        print(f"removed {len(done['removed'])} names and {done['files']} files; {done['bytes']} bytes kept")


@app.command()
def export(
    archive: Annotated[Path, typer.Argument(help="The zip to write; or, for one name, a .safetensors slot file.", show_default=False)],
    names: Annotated[list[str] | None, typer.Argument(help="Names of contexts.", show_default="all")] = None,
    key: Key = "",
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Write contexts to one file: an archive for `import`, or a slot file for `icae ask`."""
    from icae.archive import check_place
    from icae.archive import export as write

    check_place(archive)
    kept = open_store(store)
    if archive.suffix == ".safetensors":
        if names is None or len(names) != 1:
            raise ICAEError("a slot file holds one context: icae store export slots.safetensors NAME")
        kept.load(names[0], namespace_of(key)).save(archive)
        count = 1
    else:
        count = write(kept, archive, names, namespace=namespace_of(key))
    results = {"file": str(archive), "contexts": count, "bytes": archive.stat().st_size}
    print(json.dumps(results) if as_json else f"{count} contexts, {results['bytes']} bytes: {archive}")


@app.command("import")
def import_(
    archive: Annotated[Path, typer.Argument(help="A zip as `icae store export` writes it.", show_default=False)],
    key: Key = "",
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Take the contexts of an archive into the store."""
    from icae.archive import import_ as read

    kept = open_store(store, make=True)
    _check_key(kept, key)
    names = read(kept, archive, namespace=namespace_of(key))
    print(json.dumps({"imported": names}, ensure_ascii=False) if as_json else f"imported {len(names)} contexts")


@dataclass(frozen=True)
class _Text:
    name: str
    source: str
    text: str
    found: bool = False
    """In a folder, not named itself."""


def _texts(sources: list[str]) -> Iterator[_Text]:
    """Yield every text that `sources` name; what a folder holds and cannot be read as a text is told and left out."""
    from icae.data import decoded, read_text

    for source in sources:
        if not source:
            raise ICAEError("a source is empty; name a text file, a folder, or '-'")
        if source == "-":
            text = decoded(sys.stdin.buffer.read(), "standard input")
            yield _Text("stdin", "standard input", _filled(text, "standard input"))
        elif Path(source).is_dir():
            files = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in _TEXTS and p.is_file())
            if not files:
                raise ICAEError(f"folder {source} holds no texts ({', '.join(_TEXTS)})")
            for file in files:
                try:
                    yield _Text(str(file), str(file), _filled(read_text(str(file)), str(file)), found=True)
                except ICAEError as error:
                    say(f"left out: {error}")
        else:
            yield _Text(source, source, _filled(read_text(source), source))


def _check_key(kept: SlotStore, name: str) -> None:
    """Refuse a key where its name is wanted, and say so where the server has no key of that name yet."""
    from icae.server.keys import KEYS, PREFIX, Keyring

    if name.startswith(PREFIX):
        raise ICAEError("--key takes a key's name, not the key itself")
    if name and name not in {row["name"] for row in Keyring(kept.folder / KEYS).rows()}:
        say(f"no key is named {name!r} yet; `icae serve --add-key {name}` makes one")


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _filled(text: str, source: str) -> str:
    if not text.strip():
        raise ICAEError(f"{source} is empty; give a text of at least two tokens")
    return text


def _row(entry: Entry) -> dict[str, Any]:
    """Return an entry as plain values, without the server's namespace and handle."""
    values = {**entry.__dict__}
    return {name: values[name] for name in values if name not in ("namespace", "id")}
