"""`icae serve` as a process of its own, and what a client sees of it: answers, times, memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

PATIENCE = 1200.0
"""Seconds after which something that does not answer has hung."""


@dataclass(frozen=True)
class Answer:
    """What came back from one request, and when."""

    text: str
    tokens: int
    first: float
    """Seconds until the first piece of text."""
    whole: float
    usage: dict[str, Any]


class Served:
    """A server on a store, as a context manager."""

    def __init__(self, store: Path, model: str | None, base: str | None, **limits: int):
        self.command = [sys.executable, "-c", "from icae.cli import main; main()", "serve", "--port", "0", "--store", str(store)]
        for name, value in (("--model", model), ("--base", base)):
            self.command += [name, value] if value else []
        for name, number in limits.items():
            self.command += ["--limit", f"{name}={number}"]

    def __enter__(self) -> Served:
        """Start it, and wait until it answers."""
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(self.command, stderr=self.log, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(r"running on (http://\S+)", Path(self.log.name).read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{Path(self.log.name).read_text()[-2000:]}")
            time.sleep(0.2)
        self.url = found[1]
        self.client = self.connect()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop it."""
        self.client.close()
        self.process.terminate()
        self.process.wait(90)
        self.log.close()

    def connect(self) -> httpx.Client:
        """Return a client of its own."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE)

    def memory(self) -> int:
        """Return the server's resident bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def metric(self, name: str) -> float:
        """Return a number from /metrics."""
        return float(re.search(rf"^{name} (\S+)", self.client.get("/metrics").text, re.MULTILINE)[1])


def chat(context: dict[str, Any] | None, question: str, limit: int, **more: Any) -> dict[str, Any]:
    """Return the body of a chat about a context part, whose answer begins with the likeliest token, as a stream's does."""
    content = [*([{"type": "context", **context}] if context else []), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": limit, "beginnings": 1, **more}


def ask(client: httpx.Client, body: dict[str, Any]) -> str:
    """Return a whole answer's text; any status but 200 is an `httpx.HTTPStatusError`."""
    reply = client.post("/v1/chat/completions", json=body).raise_for_status()
    return reply.json()["choices"][0]["message"]["content"]


def stream(client: httpx.Client, body: dict[str, Any], *, leave: bool = False) -> Answer:
    """Read an answer as a stream, taking times; `leave` goes away after its first piece."""
    begin, first, text, usage = time.perf_counter(), None, "", {}
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            piece = chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""
            usage = chunk.get("usage") or usage
            if piece and first is None:
                first = time.perf_counter() - begin
            text += piece
            if leave and text:
                break
    whole = time.perf_counter() - begin
    return Answer(text, usage.get("completion_tokens", 0), whole if first is None else first, whole, usage)
