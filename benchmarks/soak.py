"""Many clients, many kinds of requests, some cancelled, some malformed: every answer must be the one that is due, and memory must stay.

Every client draws its requests from a seed of its own. What is due was asked alone before. Each request ends as exactly one of
`right`, `refused` (malformed, and told so), `left` (cancelled by its client), `wrong` (another answer), `lost` (none, or an error).
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
from served import Served, ask, chat, stream

MALFORMED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"content": b"{", "headers": {"content-type": "application/json"}}),
    ("/v1/chat/completions", {"json": {"messages": []}}),
    ("/v1/chat/completions", {"json": chat({"context_id": "0" * 32}, "who?", 4)}),
    ("/v1/chat/completions", {"json": chat({"context_id": "../../etc/passwd"}, "who?", 4)}),
    ("/v1/chat/completions", {"json": {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "gASV"}]}]}}),
    ("/v1/completions", {"json": {"prompt": "x", "max_tokens": -1}}),
    ("/v1/contexts", {"content": b"\xff\xfe", "headers": {"content-type": "text/plain"}}),
    ("/v1/contexts", {"files": {"other": b"x"}}),
]


def soak(server: Served, texts: dict[str, str], questions: list[str], *, requests: int, clients: int, limit: int) -> dict[str, Any]:
    """Load a server.

    Parameters
    ----------
    server : Served
        Already holds the contexts of `texts`.
    texts : dict
        Contexts: id -> text.
    questions : list of str
        Each is asked of each context.
    requests, clients, limit : int
        Requests in all after the warm-up (a fifth as many), clients at once, tokens an answer.

    Returns
    -------
    dict
        Counts by outcome and by kind, `memory_before` (after the warm-up), `memory_after`, `memory_ratio`, and `left_over`: jobs that
        the server still holds at the end.
    """
    pairs = [(id, question) for id in texts for question in questions]
    due = {pair: ask(server.client, chat({"context_id": pair[0]}, pair[1], limit)) for pair in pairs}
    going_on = {id: _complete(server.client, id, limit) for id in texts}

    def one(client: httpx.Client, chance: random.Random, mark: str) -> tuple[str, str]:
        id, question = chance.choice(pairs)
        draw = chance.random()
        if draw < 0.05:
            path, request = chance.choice(MALFORMED)
            status = client.post(path, **request).status_code
            return "malformed", "refused" if 400 <= status < 500 and status not in (408, 429) else "wrong"
        body = chat({"context_id": id}, question, limit)
        if draw < 0.10:
            stream(client, body, leave=True)
            return "cancelled", "left"
        if draw < 0.20:
            return "completion", _judge(_complete(client, id, limit), going_on[id])
        if draw < 0.28:
            body = chat({"text": texts[id]}, question, limit)
            return "text on the way", _judge(ask(client, body), due[id, question])
        if draw < 0.36:
            return "context", "right" if _comes_and_goes(client, mark) else "wrong"
        if draw < 0.42:
            listed = {c["id"] for c in client.get("/v1/contexts").raise_for_status().json()["data"]}
            return "list", "right" if set(texts) <= listed else "wrong"
        if draw < 0.70:
            return "stream", _judge(stream(client, body).text, due[id, question])
        return "chat", _judge(ask(client, body), due[id, question])

    _drive(server, one, requests // 5, clients, seed=1)
    before = _settled(server)
    begin = time.perf_counter()
    kinds, outcomes = _drive(server, one, requests, clients, seed=2)
    seconds = time.perf_counter() - begin
    after = _settled(server)
    return {
        "requests": requests,
        "clients": clients,
        "seconds": seconds,
        "kinds": dict(sorted(kinds.items())),
        "outcomes": {name: outcomes[name] for name in ("right", "refused", "left", "wrong", "lost")},
        "memory_before": before,
        "memory_after": after,
        "memory_ratio": after / before,
        "left_over": server.metric("icae_active") + server.metric("icae_queue"),
    }


def _drive(server: Served, one: Callable, requests: int, clients: int, seed: int) -> tuple[Counter, Counter]:
    """Have `clients` threads do `requests` together; return how many were of each kind, and of each outcome."""
    kinds: Counter = Counter()
    outcomes: Counter = Counter()
    lock, numbers = threading.Lock(), iter(range(requests))

    def work(which: int) -> None:
        chance = random.Random(f"{seed}-{which}")
        with server.connect() as client:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    kind, outcome = one(client, chance, f"{seed}-{number}")
                except Exception as error:  # whatever it was: the client has no answer
                    kind, outcome = "failed", "lost"
                    print(f"lost: {type(error).__name__}: {error}", flush=True)
                if outcome == "wrong":
                    print(f"wrong: {kind}, request {number}", flush=True)
                with lock:
                    kinds[kind] += 1
                    outcomes[outcome] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return kinds, outcomes


def _judge(got: str, due: str) -> str:
    if got == due:
        return "right"
    print(f"wrong: {got!r} instead of {due!r}", flush=True)
    return "wrong"


def _complete(client: httpx.Client, id: str, limit: int) -> str:
    reply = client.post("/v1/completions", json={"context_id": id, "max_tokens": limit}).raise_for_status()
    return reply.json()["choices"][0]["text"]


def _comes_and_goes(client: httpx.Client, mark: str) -> bool:
    """Add a context of one's own, look at it, and take it away; tell whether all of that was as it should be."""
    text = f"Note {mark}: the ferry leaves when the bell has rung twice, and comes back with the mail."
    made = client.post("/v1/contexts", json={"text": text, "name": mark}).raise_for_status().json()
    shown = client.get(f"/v1/contexts/{made['id']}").raise_for_status().json()
    client.delete(f"/v1/contexts/{made['id']}").raise_for_status()
    gone = client.get(f"/v1/contexts/{made['id']}").status_code == 404
    return gone and shown["name"] == mark and shown["tokens"] == made["tokens"] and not made["cached"]


def _settled(server: Served) -> int:
    """Return the server's memory once it has forgotten who went away."""
    deadline = time.monotonic() + 60
    while server.metric("icae_active") + server.metric("icae_queue") and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(1)
    return server.memory()
