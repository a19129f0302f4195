import asyncio
import base64
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from safetensors.torch import save as to_safetensors
from tiny import LINES, TEMPLATE, base_logits, make_icae, one_line, random_ids
from typer import Typer
from typer.testing import CliRunner

import icae.decoder
from icae import store_cli
from icae.beginnings import echo
from icae.catalogue import Busy, namespace_of
from icae.errors import ICAEError
from icae.objectives import Example, Marker
from icae.reader import GREEDY
from icae.serve_cli import serve
from icae.server import service as service_room
from icae.server.app import create_app
from icae.server.keys import Keyring
from icae.server.limits import Limits
from icae.server.service import Speech
from icae.slots import MemorySlots
from icae.store import SlotStore

TEXT, QUESTION = " ".join(LINES), "Who rings?"
MODEL = "tiny-icae"


@pytest.fixture(scope="module")
def model(base):
    return make_icae(base, stirred=0.05)


@pytest.fixture
def store(tmp_path):
    return SlotStore(tmp_path / "store")


@pytest.fixture
def client(model, store):
    with TestClient(create_app(model, store, name=MODEL), raise_server_exceptions=False) as made:
        yield made


def context(**part):
    return {"type": "context", **part}


def ask(client, *parts, question=QUESTION, **options):
    content = [*parts, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **options}
    return client.post("/v1/chat/completions", json=body)


def said(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def events(reply):
    """The chunks of a stream, which must end as OpenAI's does."""
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def problem(reply, status, *parts):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"] and "Traceback" not in reply.text
    for part in parts:
        assert part in error["message"]
    return error


def library(model, store, name, question=QUESTION, limit=12):
    """What the library itself answers from the stored slots, stripped of nothing."""
    return "".join(model.stream_answer(store.load(name), question, max_new_tokens=limit))


# ---- contexts ----


def test_a_context_is_made_once_listed_shown_and_deleted(client, store):
    first = client.post("/v1/contexts", json={"text": TEXT, "name": "harbour"}).json()
    assert first["cached"] is False and first["name"] == "harbour" and re.fullmatch("[0-9a-f]{32}", first["id"])
    assert first["tokens"] == len(store.read(store.entry("harbour").entry)[1]) and first["slots"] < first["tokens"]
    again = client.post("/v1/contexts", json={"text": TEXT, "name": "harbour"}).json()
    assert again["cached"] is True and again["id"] == first["id"]
    assert [c["id"] for c in client.get("/v1/contexts").json()["data"]] == [first["id"]]
    assert client.get(f"/v1/contexts/{first['id']}").json()["slots"] == first["slots"]
    assert client.delete(f"/v1/contexts/{first['id']}").json()["deleted"] is True
    problem(client.get(f"/v1/contexts/{first['id']}"), 404)
    problem(client.delete(f"/v1/contexts/{first['id']}"), 404)
    assert store.entries() == []


def test_a_reading_has_characters_of_several_tokens_whole(client):
    text = "港の灯台守は真鍮のランプを窓に置く。🦀 Naïve café façade."
    made = client.post("/v1/contexts", json={"text": text}).json()
    tokens = client.get(f"/v1/contexts/{made['id']}/reading?segments=64").json()["tokens"]
    assert len(tokens) == made["tokens"] and "".join(t["text"] for t in tokens) == text


def test_json_plain_text_and_uploads_make_the_same_content(client, store):
    client.post("/v1/contexts", json={"text": TEXT, "name": "json"})
    client.post("/v1/contexts", content=TEXT.encode(), headers={"content-type": "text/plain; charset=utf-8"})
    client.post("/v1/contexts", files={"file": ("../../etc/passwd", TEXT.encode())})
    client.post("/v1/contexts", files={"file": ("x.txt", TEXT.encode())}, data={"name": "named", "ratio": "2"})
    entries = {e.name: e for e in store.entries()}
    assert set(entries) == {"json", f"text-{entries['json'].entry[:12]}", ".._.._etc_passwd", "named"}
    assert len({e.entry for e in entries.values()}) == 2 and entries["named"].about["ratio"] == 2


def test_an_edited_context_gets_another_id(client):
    ids = [client.post("/v1/contexts", json={"text": t, "name": "a"}).json()["id"] for t in (TEXT, TEXT + " More.")]
    assert ids[0] != ids[1]
    problem(client.get(f"/v1/contexts/{ids[0]}"), 404)


def test_a_context_is_read_back_token_by_token(client, model, store):
    store.add(model, TEXT, "a", dtype="float32")
    entry, (slots, ids) = store.entry("a"), store.read(store.entry("a").entry)
    reading = client.get(f"/v1/contexts/{entry.id}/reading?segments=64").json()
    assert reading["complete"] and reading["slots"] == entry.slots and "".join(t["text"] for t in reading["tokens"]) == TEXT
    assert sorted({t["slot"] for t in reading["tokens"]}) == list(range(entry.slots))
    part, first = slots.split()[0], ids[: slots.segments[0].tokens]
    (score,) = model.score([part], [Example([first], Marker.AE, [], first)])
    assert [t["hit"] for t in reading["tokens"][: len(first)]] == score.hits.tolist()
    plain = base_logits(model.base, first).log_softmax(-1)[:-1].gather(1, torch.tensor(first[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([t["surprise"] for t in reading["tokens"][1 : len(first)]]), -plain, atol=1e-4, rtol=0)
    short = client.get(f"/v1/contexts/{entry.id}/reading?segments=1").json()
    assert not short["complete"] and len(short["tokens"]) == len(first)
    problem(client.get(f"/v1/contexts/{'0' * 32}/reading"), 404)
    problem(client.get(f"/v1/contexts/{entry.id}/reading?segments=0"), 422)


def test_a_segment_of_one_token_is_read_back(client, model, store):
    list(store.adding(model, random_ids(17)[0], "a", ratio=16))
    entry = store.entry("a")
    assert [s.tokens for s in store.load("a").segments] == [16, 1]
    reading = client.get(f"/v1/contexts/{entry.id}/reading?segments=64").json()
    assert reading["complete"] and len(reading["tokens"]) == 17 and reading["tokens"][16]["surprise"] == 0


def test_a_reading_of_the_first_segments_leaves_the_others_alone(client, model, store, monkeypatch):
    store.add(model, TEXT, "a")
    read, real = [], MemorySlots.segment
    monkeypatch.setattr(MemorySlots, "segment", lambda slots, number: read.append(number) or real(slots, number))
    assert client.get(f"/v1/contexts/{store.entry('a').id}/reading?segments=2").status_code == 200
    assert read == [0, 1] and len(store.load("a").segments) > 2


@pytest.mark.parametrize(
    "request_, status",
    [
        ({"json": {"text": ""}}, 400),
        ({"json": {"text": "x"}}, 400),
        ({"json": {}}, 422),
        ({"json": {"text": TEXT, "ratio": 0}}, 422),
        ({"json": {"text": TEXT, "name": "a\nb"}}, 400),
        ({"json": [1]}, 422),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 422),
        ({"content": b"\xff\xfe", "headers": {"content-type": "text/plain"}}, 422),
        ({"content": b'{"text": "\\ud800 lone"}', "headers": {"content-type": "application/json"}}, 422),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 422),
        ({"content": b"x", "headers": {"content-type": "image/png"}}, 415),
        ({"content": b"x"}, 415),
        ({"files": {"other": ("a", b"b")}}, 422),
        ({"files": {"file": ("a", b"\xff\xfe")}}, 422),
    ],
)
def test_bad_contexts_are_refused(client, store, request_, status):
    problem(client.post("/v1/contexts", **request_), status)
    assert store.entries() == []


# ---- chat ----


def test_answers_are_the_library_s_own(client, model, store):
    id = client.post("/v1/contexts", json={"text": TEXT, "name": "a"}).json()["id"]
    expected = library(model, store, "a")
    assert said(ask(client, context(context_id=id))) == expected
    assert said(ask(client, context(text=TEXT))) == expected
    chunks = events(ask(client, context(context_id=id), stream=True, stream_options={"include_usage": True}))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == expected
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant" and chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["icae"]["context_tokens"] == store.entry("a").tokens
    assert said(ask(client, question=QUESTION)) == "".join(model.stream_answer(None, QUESTION, max_new_tokens=12))


def test_usage_counts_what_was_read_and_what_was_saved(client, model, store):
    usage = ask(client, context(text=TEXT)).json()["usage"]
    (entry,) = store.entries()
    prompt = len(model.base.tokenizer(templated(model, QUESTION), add_special_tokens=False)["input_ids"])
    assert usage["prompt_tokens"] == entry.slots + 2 + prompt
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["icae"]["saved_tokens"] == entry.tokens - entry.slots
    assert usage["icae"]["kv_bytes"] == usage["prompt_tokens"] * 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, size, float32


def test_long_contexts_are_asked_where_the_question_points(client, model, store, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.replace(focus=2))
    other = " ".join(LINES[::-1])
    ids = [client.post("/v1/contexts", json={"text": text, "name": name}).json()["id"] for text, name in ((TEXT, "a"), (other, "b"))]
    slots = MemorySlots.concatenate([store.load("a"), store.load("b")])
    assert len(slots.segments) == sum(store.catalogue.segments(e.entry) for e in store.entries()) > 2
    for question in (QUESTION, LINES[1], QUESTION):  # the first question's segments are kept beside the second's
        narrow = model.focused(slots, question)
        reply = ask(client, *(context(context_id=id) for id in ids), question=question)
        assert said(reply) == "".join(model.stream_answer(narrow, question, max_new_tokens=12))
        usage = reply.json()["usage"]["icae"]
        assert usage["slots"] == narrow.count < slots.count and usage["context_tokens"] == slots.tokens
    assert store.catalogue.segments("unknown") == 0
    whole = client.post("/v1/completions", json={"prompt": " and", "context_id": ids[0], "max_tokens": 4}).json()
    assert whole["usage"]["icae"]["slots"] == store.load("a").count  # what goes on is no question


def test_answers_are_spelled_as_the_library_spells_them(client, model, store, monkeypatch):
    free = said(ask(client, context(text=TEXT)))
    monkeypatch.setattr(model, "config", model.config.replace(grounding=1000))
    made = client.post("/v1/contexts", json={"text": " ".join(LINES[::-1]), "name": "b"}).json()
    for _ in range(2):  # from the store, and from memory
        answer = said(ask(client, context(context_id=made["id"])))
        assert answer == library(model, store, "b") != free


def test_answers_are_begun_as_the_library_begins_them_and_streams_at_once(client, model, store, monkeypatch):
    id = client.post("/v1/contexts", json={"text": TEXT, "name": "a"}).json()["id"]
    plainly = model.config
    monkeypatch.setattr(model, "config", plainly.replace(beginnings=4))
    both = []
    for question in LINES:
        several = library(model, store, "a", question)
        with monkeypatch.context() as one:
            one.setattr(model, "config", plainly.replace(beginnings=1))
            both.append((question, library(model, store, "a", question), several))
    question, greedy, several = next(row for row in both if row[1] != row[2])
    part = context(context_id=id)

    def answer(*parts, **options):
        return said(ask(client, *parts, question=question, **options))

    assert answer(part) == answer(part, beginnings=4) == several
    assert answer(part, beginnings=1) == greedy
    for options, expected in (({}, greedy), ({"beginnings": 4}, several), ({"beginnings": 0}, several)):
        chunks = events(ask(client, part, question=question, stream=True, **options))
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected
    assert len({answer(part, beginnings=n, temperature=1.0, seed=3) for n in (1, 4)}) == 1
    assert answer(beginnings=4) == "".join(model.stream_answer(None, question, max_new_tokens=12))  # without contexts the base as it is
    problem(ask(client, part, beginnings=9), 422, "beginnings")


def test_later_turns_are_begun_as_the_library_begins_them(client, model, store, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.replace(beginnings=4))
    doubted = []
    monkeypatch.setattr(service_room, "echo", lambda prompt, decode: doubted.append(prompt) or echo(prompt, decode))
    id = client.post("/v1/contexts", json={"text": TEXT, "name": "a"}).json()["id"]
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    opening = {"role": "user", "content": [context(context_id=id), {"type": "text", "text": "One?"}]}
    body = {"messages": [opening, turns[1], {"role": "user", "content": QUESTION}], "max_tokens": 12}
    expected = "".join(model.stream_answer(store.load("a"), QUESTION, history=turns, max_new_tokens=12))
    assert said(client.post("/v1/chat/completions", json=body)) == expected
    assert doubted == [QUESTION]


def templated(model, question):
    assert model.base.tokenizer.chat_template == TEMPLATE
    return model.base.tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)


def test_several_contexts_and_turns(client, model, store):
    texts = [LINES[0], LINES[1]]
    for i, text in enumerate(texts):
        store.add(model, text, f"t{i}")
    ids = [e.id for e in store.entries()]
    slots = MemorySlots.concatenate([store.load("t0"), store.load("t1")])
    history = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    expected = "".join(model.stream_answer(slots, QUESTION, history=history, max_new_tokens=12))
    body = {
        "messages": [
            {"role": "user", "content": [context(context_id=ids[0]), {"type": "text", "text": "One?"}]},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}, context(context_id=ids[1])]},
        ],
        "max_completion_tokens": 12,
    }
    assert said(client.post("/v1/chat/completions", json=body)) == expected


def test_prompt_embeds_stand_for_text(client, model):
    ids = model.base.encode(QUESTION)
    embeds = model.base.embed(torch.tensor(ids)).detach()
    part = {"type": "prompt_embeds", "data": base64.b64encode(to_safetensors({"x": embeds})).decode()}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 12}
    template = templated(model, "@@").split("@@")
    before, after = (model.base.tokenizer(t, add_special_tokens=False)["input_ids"] for t in template)
    plain = [*before, *ids, *after]
    made = model.reader.collect(None, [plain], None, [12], GREEDY)[0]
    assert said(client.post("/v1/chat/completions", json=body)) == model.base.decode(made)


def bad_embeds():
    torch.save(torch.zeros(2, 32), pickled := io.BytesIO())
    yield pickled.getvalue(), "torch.save"
    yield pickle.dumps([1]), "torch.save"
    yield to_safetensors({"x": torch.zeros(2, 31)}), "32"
    yield to_safetensors({"x": torch.zeros(2, 32), "y": torch.zeros(2, 32)}), "2 tensors"
    yield to_safetensors({"x": torch.zeros(2, 32, dtype=torch.int64)}), "floating"
    yield to_safetensors({"x": torch.full((2, 32), float("nan"))}), "infinite"
    yield to_safetensors({"x": torch.zeros(0, 32)}), "32"
    yield to_safetensors({"x": torch.zeros(600, 32)}), "positions"


@pytest.mark.parametrize("data, part", bad_embeds())
def test_bad_embeds_are_refused(client, data, part):
    body = {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": base64.b64encode(data).decode()}]}]}
    problem(client.post("/v1/chat/completions", json=body), 400, part)


def test_completions_continue_texts_and_contexts(client, model, store):
    store.add(model, TEXT, "a")
    body = {"prompt": "", "context_id": store.entry("a").id, "max_tokens": 12}
    expected = "".join(model.stream_continuation(store.load("a"), max_new_tokens=12, may_end=True))
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
    chunks = events(client.post("/v1/completions", json={**body, "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected
    ids = random_ids(7)[0]
    made = model.reader.collect(None, [ids], None, [12], GREEDY)[0]
    assert client.post("/v1/completions", json={"prompt": ids, "max_tokens": 12}).json()["choices"][0]["text"] == model.base.decode(made)
    led = [
        model.base.tokenizer.bos_token_id,
        *model.base.encode(LINES[0]),
    ]  # ids are the client's own, a text is read as the base reads one
    made = model.reader.collect(None, [led], None, [12], GREEDY)[0]
    assert client.post("/v1/completions", json={"prompt": LINES[0], "max_tokens": 12}).json()["choices"][0]["text"] == model.base.decode(
        made
    )
    for one in (LINES[0], ids):
        told = [client.post("/v1/completions", json={"prompt": p, "max_tokens": 12}).json()["choices"] for p in (one, [one])]
        assert told[0] == told[1]
    texts = [client.post("/v1/completions", json={"prompt": p, "max_tokens": 12}).json()["choices"] for p in (["42"], "42", [42])]
    assert texts[0] == texts[1] != texts[2]
    for several in (["a", "b"], [[5], [6]], ["a", 5]):
        problem(client.post("/v1/completions", json={"prompt": several}), 422, "prompt: ", "one by one")
    for bad in ([5, 6.0], [True], [None], [[["a"]]]):
        problem(client.post("/v1/completions", json={"prompt": bad}), 422, "prompt")
    problem(client.post("/v1/completions", json={"prompt": "a", "logprobs": 0}), 422, "logprobs is not supported")
    neutral = {"logprobs": None, "echo": False, "n": 1, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "best_of": 1}
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, **neutral}).status_code == 200
    problem(client.post("/v1/completions", json={"prompt": [10**6]}), 400, "ids")
    problem(client.post("/v1/completions", json={"prompt": ""}), 400, "empty")


def test_sampling_with_a_seed_repeats_itself(client):
    one, two, other = (said(ask(client, temperature=1.0, top_p=0.9, seed=s, max_tokens=30)) for s in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("options", [{"temperature": 1e-310}, {"temperature": 1.0, "top_p": 1e-310}])
def test_the_smallest_temperature_and_top_p_take_the_likeliest(client, options):
    assert said(ask(client, **options)) == said(ask(client))


def test_a_stop_string_ends_the_answer(client, model):
    whole = said(ask(client, max_tokens=30))
    stop = whole[10:13]
    reply = ask(client, max_tokens=30, stop=[stop]).json()["choices"][0]
    assert reply["message"]["content"] == whole[: whole.index(stop)] and reply["finish_reason"] == "stop"
    chunks = events(ask(client, max_tokens=30, stop=stop, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole[: whole.index(stop)]


def test_speech_holds_back_what_may_become_a_stop_string(base):
    ids, heard = base.encode("the bell rings twice"), ""
    speech = Speech(base, ["rings t", "zz"])
    for n in range(1, len(ids) + 1):
        heard += speech.hear(ids[:n], n == len(ids))
        assert "r" not in heard.replace("the bell ", "")
        if speech.stopped:
            break
    assert heard == "the bell " and speech.stopped
    speech, ids = Speech(base, []), base.encode("é")
    assert len(ids) == 2 and [speech.hear(ids[:1]), speech.hear(ids, True)] == ["", "é"]


@pytest.mark.parametrize(
    "change, status, part",
    [
        ({"model": "gpt-9"}, 404, MODEL),
        ({"n": 2}, 422, "n is not supported"),
        ({"n": 0}, 422, "n is not supported"),
        ({"logprobs": 0}, 422, "logprobs is not supported"),
        ({"tools": [{}]}, 422, "tools"),
        ({"temperature": -1}, 422, "temperature"),
        ({"top_p": 0}, 422, "top_p"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"max_tokens": 10_000}, 400, "positions"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 422, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 422, ""),
        ({"messages": [{"role": "user", "content": [context()]}]}, 422, "either"),
        ({"messages": [{"role": "user", "content": [context(text="x", context_id="0" * 32)]}]}, 422, "either"),
        ({"messages": [{"role": "user", "content": [context(context_id="0" * 32)]}]}, 404, "no context"),
        ({"messages": [{"role": "user", "content": [context(context_id="../../etc")]}]}, 422, "pattern"),
        ({"messages": [{"role": "user", "content": [context(text="x")]}]}, 400, "two tokens"),
        ({"messages": [{"role": "user", "content": "x"}] * 300}, 400, "256"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_chats_are_refused(client, change, status, part, stream):
    problem(ask(client, **{"stream": stream, **change}), status, part)


def test_slots_of_another_base_are_refused(client, store, other_base):
    store.add(make_icae(other_base), TEXT, "foreign")
    problem(ask(client, context(context_id=store.entry("foreign").id)), 400, "base")


def test_models_health_metrics_and_descriptions(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == [MODEL]
    assert client.get("/healthz").json() == {"status": "ok"}
    ask(client, context(text=TEXT))
    text = client.get("/metrics").text
    assert "icae_queue 0.0" in text and 'icae_requests_total{method="POST",status="200"} 1.0' in text
    assert float(re.search(r'icae_tokens_total\{kind="saved"\} (\S+)', text)[1]) > 100
    assert "/v1/contexts/{id}" in client.get("/openapi.json").json()["paths"]
    problem(client.get("/nowhere"), 404)
    problem(client.put("/v1/contexts"), 405)


# ---- load ----


def clear(model, store, asked, limit, monkeypatch):
    """Those of the (name, question) pairs whose answers never hang on a near tie, which a batch's rounding may decide; their answers."""
    gaps, real = [], icae.decoder.choose

    def watched(logits, *rest):
        first, second = logits.topk(2).values.unbind(-1)
        gaps.append(float((first - second).min()))
        return real(logits, *rest)

    found = []
    with monkeypatch.context() as m:
        m.setattr(icae.decoder, "choose", watched)
        for name, question in asked:
            gaps.clear()
            answer = library(model, store, name, question, limit)
            if min(gaps) > 1e-3:
                found.append((name, question, answer))
    return found


def test_many_clients_get_their_own_answers(client, model, store, monkeypatch):
    texts = [" ".join(LINES[i:] + LINES[:i]) for i in range(4)]
    for i, text in enumerate(texts):
        store.add(model, text, f"t{i}")
    ids = {e.name: e.id for e in store.entries()}
    asked = clear(model, store, [(f"t{i % 4}", f"What is {i}?") for i in range(40)], 20, monkeypatch)[:16]
    expected, got = [answer for *_, answer in asked], [None] * 16
    assert len(expected) == 16 and len({*expected}) > 8

    def one(i):
        name, question, _ = asked[i]
        reply = ask(client, context(context_id=ids[name]), question=question, max_tokens=20, stream=bool(i % 2))
        got[i] = "".join(c["choices"][0]["delta"].get("content", "") for c in events(reply)) if i % 2 else said(reply)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert got == expected


def test_equal_texts_at_the_same_time_are_compressed_once(model, store):
    counted, compress = [], model.compressing
    with TestClient(create_app(model, store)) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "compressing", lambda contexts, **kw: (counted.extend(map(len, contexts)), compress(contexts, **kw))[1])
        threads = [threading.Thread(target=client.post, args=("/v1/contexts",), kwargs={"json": {"text": TEXT}}) for _ in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
    (entry,) = store.entries()
    assert sum(counted) == entry.tokens


def test_asking_a_hot_context_counts_as_a_use(client, store, model, monkeypatch):
    monkeypatch.setattr("icae.catalogue.USED_GRAIN", 0)
    store.add(model, TEXT, "a")
    id, used = store.entry("a").id, []
    for _ in range(3):
        said(ask(client, context(context_id=id), max_tokens=1))
        used.append(store.entry("a").used)
    assert client.app.state.server.service.prefixes.hits == 2 and used[0] < used[1] < used[2]


def test_a_text_that_the_store_cannot_keep_is_refused_and_says_so(model, store):
    with TestClient(create_app(model, store, limits=Limits(store_bytes=100))) as client:
        answer = client.post("/v1/contexts", json={"text": LINES[0]})
    assert answer.status_code == 400 and "store_bytes" in answer.json()["error"]["message"]
    assert store.entries(None) == []


def test_a_text_that_the_store_cannot_keep_leaves_what_had_its_name(model, store):
    kept = store.add(model, LINES[0], "a").entry
    with TestClient(create_app(model, store, limits=Limits(store_bytes=kept.bytes + 100))) as client:
        problem(client.post("/v1/contexts", json={"text": TEXT, "name": "a"}), 400, "store_bytes")
    assert [e.id for e in store.entries(None)] == [kept.id]


def test_a_text_that_the_store_cannot_keep_takes_no_other_along(model, store):
    kept = [store.add(model, line, f"a{i}", namespace="other").entry for i, line in enumerate(LINES[:2])]
    with TestClient(create_app(model, store, limits=Limits(store_bytes=sum(e.bytes for e in kept) + 100))) as client:
        problem(client.post("/v1/contexts", json={"text": TEXT, "name": "large"}), 400, "store_bytes")
        assert [e.name for e in store.entries(None)] == ["a0", "a1"]
        assert client.post("/v1/contexts", json={"text": LINES[2], "name": "small"}).status_code == 200
    assert "small" in {e.name for e in store.entries(None)}


def test_a_chat_s_new_text_does_not_drive_out_the_context_beside_it(model, store, monkeypatch):
    monkeypatch.setattr("icae.catalogue.USED_GRAIN", 0)
    old, other = (store.add(model, line, name).entry for line, name in ((LINES[0], "old"), (LINES[1], "other")))
    with TestClient(create_app(model, store, limits=Limits(store_bytes=old.bytes + other.bytes + 100))) as client:
        said(ask(client, context(context_id=old.id), context(text=LINES[1][:60]), max_tokens=2))
        assert {e.name for e in store.entries()} >= {"old"} and "other" not in {e.name for e in store.entries()}


def test_what_was_driven_out_meanwhile_is_not_found(client, model, store, monkeypatch):
    id, find = store.add(model, TEXT, "a").entry.id, service_room.Service.find
    missed = client.get(f"/v1/contexts/{'0' * 32}")

    def found_and_lost(self, namespace, id):
        entry = find(self, namespace, id)
        store.gc(0)
        return entry

    monkeypatch.setattr(service_room.Service, "find", found_and_lost)
    kind = problem(ask(client, context(context_id=id)), 404, "no longer in the store")["type"]
    assert kind == problem(missed, 404)["type"]
    monkeypatch.setattr(service_room.Service, "find", find)
    store.add(model, TEXT, "a")
    read = store.blobs.read
    monkeypatch.setattr(store.blobs, "read", lambda key: store.gc(0) and read(key))  # between its list and its files
    problem(client.get(f"/v1/contexts/{store.entry('a').id}/reading"), 404, "no longer in the store")


def test_a_context_is_kept_though_the_clearing_behind_it_finds_the_catalogue_held(model, store, monkeypatch, caplog):
    def held(*_, **__):
        raise Busy("another process holds it")

    store.add(model, LINES[0], "old")
    monkeypatch.setattr(store.catalogue, "evict", held)
    store.catalogue.wait = 0
    with TestClient(create_app(model, store, limits=Limits(store_bytes=store.entry("old").bytes * 2))) as client:
        assert client.post("/v1/contexts", json={"text": LINES[1], "name": "new"}).status_code == 200
    assert {e.name for e in store.entries()} == {"old", "new"} and "not cleared" in caplog.text


def test_contexts_that_are_too_much_together_are_refused_before_they_are_read(model, store, monkeypatch):
    a, b = (store.add(model, line, name).entry for line, name in ((LINES[0], "a"), (LINES[1], "b")))
    again = store.add(model, LINES[0], "again").entry
    read, load = [], SlotStore.read
    monkeypatch.setattr(SlotStore, "read", lambda self, content: read.append(content) or load(self, content))
    with TestClient(create_app(model, store, limits=Limits(max_context=a.tokens + b.tokens - 1))) as client:
        parts = [context(context_id=id) for id in (a.id, again.id, a.id)]
        problem(ask(client, *parts, context(context_id=b.id)), 400, f"{a.tokens + b.tokens} tokens", "more than")
        problem(ask(client, context(context_id=b.id), context(text=LINES[0])), 400, "more than")
        assert read == [] and len(store.entries()) == 3
        said(ask(client, *parts, context(text=LINES[2][:40]), context(text=LINES[2][:40]), max_tokens=2))
    with TestClient(create_app(model, store, limits=Limits(max_context=a.tokens - 1))) as client:
        problem(client.post("/v1/completions", json={"prompt": "", "context_id": a.id}), 400, "more than")


def test_what_the_store_lost_is_the_servers_fault_and_tells_no_paths(client, model, store, caplog):
    made = client.post("/v1/contexts", json={"text": TEXT, "name": "a"}).json()
    (key,) = store.catalogue.parts(store.entry("a").entry)
    (store.folder / "blobs" / key[:2] / f"{key}.safetensors").write_bytes(b"damaged")
    for reply in (ask(client, context(context_id=made["id"])), client.get(f"/v1/contexts/{made['id']}/reading")):
        error = problem(reply, 500, "log")
        assert error["type"] == "server_error" and str(store.folder) not in reply.text and "icae store" not in reply.text
    assert "icae store verify" in caplog.text


def test_a_damaged_key_file_lets_nobody_in_and_tells_no_paths(guarded):
    client, keys, keyring = guarded
    keyring.path.write_text("{")
    reply = client.get("/v1/models", headers=keys["ada"])
    assert problem(reply, 500, "log") and str(keyring.path) not in reply.text


def test_a_context_that_every_turn_brings_along_is_read_once(client, model, store):
    id = client.post("/v1/contexts", json={"text": TEXT, "name": "a"}).json()["id"]
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    body = {
        "messages": [
            {"role": "user", "content": [context(context_id=id), {"type": "text", "text": "One?"}]},
            turns[1],
            {"role": "user", "content": [context(context_id=id), {"type": "text", "text": QUESTION}]},
        ],
        "max_tokens": 12,
    }
    reply = client.post("/v1/chat/completions", json=body)
    assert said(reply) == "".join(model.stream_answer(store.load("a"), QUESTION, history=turns, max_new_tokens=12))
    assert reply.json()["usage"]["icae"]["context_tokens"] == store.entry("a").tokens


def test_contexts_too_large_to_be_kept_in_memory_are_joined_once_a_prompt(model, store, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.replace(focus=1))
    with TestClient(create_app(model, store, name=MODEL, limits=Limits(slot_bytes=1))) as client:
        id, read = client.post("/v1/contexts", json={"text": " ".join(LINES * 3), "name": "a"}).json()["id"], []
        load = SlotStore.read
        monkeypatch.setattr(SlotStore, "read", lambda self, content: read.append(content) or load(self, content))
        said(ask(client, context(context_id=id)))
    assert len(read) == 1


def test_what_the_base_has_no_positions_for_is_refused_before_it_takes_memory(client, store, model, monkeypatch):
    read, embed = [], type(model.base).embed
    monkeypatch.setattr(type(model.base), "embed", lambda self, ids: (read.append(ids.numel()), embed(self, ids))[1])
    problem(ask(client, question=TEXT * 50), 400, "512", "shorten")
    assert sum(read) <= 512
    store.add(model, TEXT * 5, "long")
    problem(ask(client, context(context_id=store.entry("long").id)), 400, "512", "shorten")
    assert client.app.state.server.service.prefixes.bytes == 0


def test_past_the_queue_comes_429_with_retry_after(model, store):
    gate, app = threading.Event(), create_app(model, store, limits=Limits(max_rows=1, max_queue=1))
    service = app.state.server.service

    def stuck(*_):
        while not gate.wait(0.01):
            yield
        return store.entry("a"), False

    store.add(model, TEXT, "a")
    with TestClient(app) as client:
        service.compress = stuck
        threads = [threading.Thread(target=client.post, args=("/v1/contexts",), kwargs={"json": {"text": TEXT}}) for _ in range(2)]
        for thread, queued in zip(threads, (0, 1), strict=True):
            thread.start()
            until(lambda queued=queued: app.state.server.scheduler.active == 1 and app.state.server.scheduler.queued == queued)
        reply = client.post("/v1/contexts", json={"text": TEXT})
        problem(reply, 429, "try again")
        assert int(reply.headers["retry-after"]) >= 1
        gate.set()
        [t.join() for t in threads]


def test_a_request_that_takes_too_long_is_504(model, store):
    with TestClient(create_app(model, store, limits=Limits(timeout=0.001))) as client:
        problem(ask(client, max_tokens=400), 504, "too long")


def until(true, seconds=15):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- security ----


@pytest.fixture
def guarded(model, store):
    keyring = Keyring(store.folder / "keys.json")
    keys = {name: keyring.add(name) for name in ("ada", "ben")}
    with TestClient(create_app(model, store, name=MODEL, keyring=keyring), raise_server_exceptions=False) as client:
        yield client, {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}, keyring


def test_without_a_key_nothing_but_health_and_the_page(guarded):
    client, keys, _ = guarded
    for bad in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic eDp5"}):
        for method, path in [("get", "/v1/contexts"), ("get", "/v1/models"), ("get", "/metrics"), ("get", f"/v1/contexts/{'0' * 32}")]:
            problem(getattr(client, method)(path, headers=bad), 401, "API key")
        problem(client.post("/v1/contexts", json={"text": TEXT}, headers=bad), 401)
        problem(client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, headers=bad), 401)
    assert client.get("/healthz").status_code == client.get("/").status_code == 200
    assert client.get("/v1/contexts", headers=keys["ada"]).status_code == 200


def test_the_command_line_gives_a_key_its_contexts(guarded, store, model):
    client, keys, _ = guarded
    store.add(model, TEXT, "mine", namespace=namespace_of("ada"))
    assert [c["name"] for c in client.get("/v1/contexts", headers=keys["ada"]).json()["data"]] == ["mine"]
    assert client.get("/v1/contexts", headers=keys["ben"]).json()["data"] == []
    client.post("/v1/contexts", json={"text": TEXT, "name": "sent"}, headers=keys["ben"])
    listed = CliRunner().invoke(store_cli.app, ["ls", "--key", "ben", "--json", "--store", str(store.folder)])
    assert [row["name"] for row in json.loads(listed.stdout)] == ["sent"]


def test_an_open_server_closes_with_its_first_key_and_stays_closed(model, store):
    keyring = Keyring(store.folder / "keys.json")
    with TestClient(create_app(model, store, keyring=keyring, open=True)) as client:
        assert client.get("/v1/contexts").status_code == 200
        headers = {"Authorization": f"Bearer {keyring.add('eve')}"}
        problem(client.get("/v1/contexts"), 401)
        assert client.get("/v1/contexts", headers=headers).status_code == 200
        keyring.remove("eve")
        problem(client.get("/v1/contexts"), 401)
    with TestClient(create_app(model, store, keyring=keyring)) as client:  # begun with keys, which were taken away
        problem(client.get("/v1/contexts"), 401)
    with TestClient(create_app(model, store, keyring=keyring, open=True)) as client:  # nobody asked between the two
        problem(client.get("/v1/contexts"), 401)


@pytest.mark.parametrize(
    "foreign", [{"origin": "https://elsewhere.example"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}]
)
def test_pages_of_other_sites_change_nothing(client, store, foreign):
    for sent in (
        {"content": TEXT, "headers": {"content-type": "text/plain"}},
        {"files": {"file": ("a.txt", TEXT.encode())}, "headers": {}},
    ):
        sent["headers"] |= foreign
        problem(client.post("/v1/contexts", **sent), 403, "another site")
    assert store.entries(None) == []
    own = {"origin": str(client.base_url), "sec-fetch-site": "same-origin"}
    assert client.post("/v1/contexts", json={"text": TEXT}, headers=own).status_code == 200
    assert client.post("/v1/contexts", json={"text": TEXT}, headers={"origin": str(client.base_url)}).status_code == 200
    assert client.get("/v1/contexts", headers=foreign).status_code == 200  # its answer is not for that page to read


def test_one_key_cannot_read_or_guess_anothers_contexts(guarded, store):
    client, keys, _ = guarded
    mine = client.post("/v1/contexts", json={"text": TEXT}, headers=keys["ada"]).json()
    assert client.get("/v1/contexts", headers=keys["ben"]).json()["data"] == []
    problem(client.get(f"/v1/contexts/{mine['id']}", headers=keys["ben"]), 404)
    problem(client.delete(f"/v1/contexts/{mine['id']}", headers=keys["ben"]), 404)
    body = {"messages": [{"role": "user", "content": [context(context_id=mine["id"])]}]}
    problem(client.post("/v1/chat/completions", json=body, headers=keys["ben"]), 404)
    problem(client.post("/v1/completions", json={"context_id": mine["id"]}, headers=keys["ben"]), 404)
    theirs = client.post("/v1/contexts", json={"text": TEXT}, headers=keys["ben"]).json()
    assert theirs["cached"] is False and theirs["id"] != mine["id"]  # it does not tell that somebody else had it
    assert len({e.entry for e in store.entries(None)}) == 1  # though it is kept once
    client.delete(f"/v1/contexts/{mine['id']}", headers=keys["ada"])
    assert client.get(f"/v1/contexts/{theirs['id']}", headers=keys["ben"]).status_code == 200


def test_what_one_key_asked_is_not_ready_for_another(guarded, model, monkeypatch):
    client, keys, _ = guarded
    monkeypatch.setattr(model, "config", model.config.replace(focus=2))
    prefixes, hits, looked = client.app.state.server.service.prefixes, [], []
    relevant = service_room.relevant
    monkeypatch.setattr(service_room, "relevant", lambda *a, **kw: looked.append(1) or relevant(*a, **kw))
    for name in ("ada", "ada", "ben", "ben"):
        body = {"messages": [{"role": "user", "content": [context(text=TEXT), {"type": "text", "text": QUESTION}]}], "max_tokens": 2}
        before = prefixes.hits
        assert client.post("/v1/chat/completions", json=body, headers=keys[name]).status_code == 200
        hits.append(prefixes.hits - before)
    assert hits == [0, 1, 0, 1]
    assert len(looked) == 2  # what it was about is remembered, each key for itself


def test_what_is_wrong_is_named_as_the_client_wrote_it(client):
    content = [{"type": "context", "context_id": "nonsense"}, {"type": "text", "text": "x"}]
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 422 and answer.json()["error"]["param"] == "messages.0.content.0.context.context_id"
    answer = client.post("/v1/chat/completions", content=b'{"messages": []}', headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 415 and "Content-Type" in answer.json()["error"]["message"]
    assert client.post("/v1/contexts", json={"text": TEXT, "rato": 2}).status_code == 422
    plain = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "response_format": {"type": "text"}}
    assert client.post("/v1/chat/completions", json=plain).status_code == 200


def test_a_long_context_is_read_from_the_store_once_whatever_is_asked(client, model, store, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.replace(focus=2))
    read, real = [], store.read
    monkeypatch.setattr(store, "read", lambda content: read.append(content) or real(content))
    for question in (QUESTION, "Where does the bell hang?", "Who rings it?"):
        assert ask(client, context(text=TEXT), question=question).status_code == 200
    assert len(read) == 1
    assert client.app.state.server.service.whole.bytes > 0


def test_keys_are_hashed_at_rest_and_revoked_at_once(guarded):
    client, keys, keyring = guarded
    key = keys["ada"]["Authorization"].removeprefix("Bearer ")
    text = keyring.path.read_text()
    assert key not in text and key[5:] not in text and keyring.path.stat().st_mode & 0o077 == 0
    new = keyring.add("ada")
    for k in (key, new):
        assert client.get("/v1/contexts", headers={"Authorization": f"Bearer {k}"}).status_code == 200
    third = keyring.add("ada", alone=True)
    told = [client.get("/v1/contexts", headers={"Authorization": f"Bearer {k}"}).status_code for k in (key, new, third)]
    assert told == [401, 401, 200] and [row["name"] for row in keyring.rows()] == ["ben", "ada"]
    assert keyring.remove("ada") == 1
    problem(client.get("/v1/contexts", headers=keys["ada"]), 401)
    with pytest.raises(ICAEError) as error:
        keyring.remove("ada")
    one_line(error.value, "'ada'", "ben")
    keyring.path.write_text("[{}]")
    with pytest.raises(ICAEError, match="damaged"):
        keyring.check(new)


def test_keys_that_are_made_at_the_same_time_are_all_kept(tmp_path, monkeypatch):
    write = Keyring._write
    monkeypatch.setattr(Keyring, "_write", lambda self, rows: (time.sleep(0.01), write(self, rows)))
    Keyring(tmp_path / "keys.json").add("first")
    adders = [threading.Thread(target=Keyring(tmp_path / "keys.json").add, args=(f"n{i}",)) for i in range(8)]
    adders.append(threading.Thread(target=Keyring(tmp_path / "keys.json").remove, args=("first",)))
    [t.start() for t in adders], [t.join() for t in adders]
    assert sorted(row["name"] for row in Keyring(tmp_path / "keys.json").rows()) == [f"n{i}" for i in range(8)]


def test_every_hash_is_compared(tmp_path, monkeypatch):
    import hmac

    keyring, compared = Keyring(tmp_path / "keys.json"), []
    keys = [keyring.add(n) for n in "abc"]
    real = hmac.compare_digest
    monkeypatch.setattr("icae.server.keys.hmac.compare_digest", lambda a, b: (compared.append(a), real(a, b))[1])
    assert keyring.check(keys[0]) == "a" and len(compared) == 3


def test_bodies_texts_and_streams_past_their_limits_are_refused(model, store):
    with TestClient(create_app(model, store, limits=Limits(max_body=2000, max_context=100))) as client:
        problem(client.post("/v1/contexts", json={"text": "x" * 3000}), 413, "2000")
        pieces = (b"x" * 500 for _ in range(10))
        problem(client.post("/v1/contexts", content=pieces, headers={"content-type": "text/plain"}), 413, "2000")
        problem(client.post("/v1/contexts", files={"file": ("a", b"x" * 3000)}), 413)
        problem(client.post("/v1/contexts", json={"text": TEXT}), 400, "more than 100")
        problem(ask(client, context(text=TEXT)), 400, "more than 100")
        assert store.entries() == []


def test_other_hosts_are_refused_where_only_this_machine_is_meant(model, store):
    with TestClient(create_app(model, store, hosts=["127.0.0.1"])) as client:
        assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400
        assert client.get("/healthz", headers={"host": "127.0.0.1:8000"}).status_code == 200


def test_defects_show_no_trace(client, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("secret path /home/x")

    monkeypatch.setattr(client.app.state.server.service, "chat", broken)
    reply = ask(client)
    problem(reply, 500, "log")
    assert "secret" not in reply.text and "secret" in caplog.text


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_pages_ask_no_other_host(client, path):
    reply = client.get(path)
    assert reply.status_code == 200 and "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", reply.text)


# ---- a real server ----


class Live:
    """uvicorn in a thread, on a free port."""

    def __init__(self, app):
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def live(model, store):
    with Live(create_app(model, store, name=MODEL)) as made:
        yield made


def test_the_openai_client_works_unchanged(live, model, store):
    import openai

    store.add(model, TEXT, "a")
    expected = library(model, store, "a")
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none")
    content = [context(context_id=store.entry("a").id), {"type": "text", "text": QUESTION}]
    options = {"model": client.models.list().data[0].id, "messages": [{"role": "user", "content": content}], "max_tokens": 12}
    reply = client.chat.completions.create(**options)
    assert reply.choices[0].message.content == expected and reply.usage.icae["slots"] == store.entry("a").slots
    stream = client.chat.completions.create(**options, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == expected
    assert client.completions.create(model=MODEL, prompt="The bell", max_tokens=5).usage.completion_tokens <= 5
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.chat.completions.create(**{**options, "model": "other"})


def test_fuzzed_against_its_own_description_nothing_is_5xx(model, store):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    statuses = set()

    def fuzz(operation, mode):
        known = {*operation.definition.raw["responses"], "400", "404", "405"}

        @settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def each(case):
            reply = case.call()
            statuses.add(reply.status_code)
            assert reply.status_code < 500, (reply.status_code, reply.text)
            assert str(reply.status_code) in known, (case.method, case.path, reply.status_code, reply.text)
            assert reply.status_code < 400 or "error" in reply.json() or b"Invalid HTTP" in reply.content

        try:
            each()
        except Unsatisfiable:  # where nothing can be wrong, no wrong request can be made
            assert mode == GenerationMode.NEGATIVE

    with Live(create_app(model, store, limits=Limits(max_tokens=4))) as live:
        for result in schemathesis.openapi.from_url(f"{live.url}/openapi.json").get_all_operations():
            for mode in GenerationMode:
                fuzz(result.ok(), mode)
    assert statuses >= {200, 422, 404}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_forgotten(live, stream):
    scheduler = live.server.config.app.state.server.scheduler

    async def go():
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 450, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        while not scheduler.running:
            await asyncio.sleep(0.005)
        writer.close()

    steps = scheduler.steps
    real = scheduler.batch.step
    scheduler.batch.step = lambda: (time.sleep(0.02), real())
    asyncio.run(go())
    until(lambda: scheduler.active == 0)
    assert scheduler.steps - steps < 300


def test_stopping_finishes_what_runs(model, store):
    app, got = create_app(model, store), []
    with Live(app) as live:
        import httpx

        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 150, "stream": True}
        thread = threading.Thread(target=lambda: got.append(httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)))
        thread.start()
        until(lambda: app.state.server.scheduler.running)
    thread.join(20)
    assert len(events(got[0])) > 10 and events(got[0])[-1]["choices"][0]["finish_reason"] in ("stop", "length")


# ---- command line ----


def run(*arguments):
    app = Typer()
    app.command()(serve)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exception if isinstance(result.exception, ICAEError) else result.stdout


def test_serve_s_mistakes_are_one_line(base, tmp_path, monkeypatch):
    at = ["--store", tmp_path]
    one_line(run("--host", "0.0.0.0", *at), "--add-key", "127.0.0.1")
    one_line(run("--limit", "nosuch=1", *at), "nosuch", "max_rows")
    one_line(run("--limit", "max_rows=x", *at), "max_rows")
    one_line(run("--limit", "max_rows=0", *at), "max_rows")
    one_line(run("--model", "nosuch", *at), "nosuch")
    one_line(run("--remove-key", "x", *at), "'x'")
    assert "max_rows" in run("--limit", "help")
    key = run("--add-key", "ada", *at).strip()
    assert Keyring(tmp_path / "keys.json").check(key) == "ada"
    new = run("--add-key", "ada", "--remove-key", "ada", *at).strip()
    assert [Keyring(tmp_path / "keys.json").check(k) for k in (key, new)] == [None, "ada"]
    (tmp_path / "file").write_text("x")
    for options in (["--add-key", "ada"], ["--remove-key", "ada"], []):
        one_line(run(*options, "--store", tmp_path / "file" / "x"), "ada" if "--remove-key" in options else "file")
    one_line(run("--remove-key", "x", "--store", tmp_path / "none"), "there are none")
    assert not (tmp_path / "none").exists()
    run("--remove-key", "ada", *at)
    monkeypatch.setattr("uvicorn.run", lambda app, **kw: print("open" if app.state.server.open else "closed"))
    make_icae(base).save_pretrained(tmp_path / "checkpoint")
    begin = ["--model", tmp_path / "checkpoint", "--port", "0"]
    assert run(*begin, *at) == "closed\n" and run(*begin, "--store", tmp_path / "other") == "open\n"


def test_the_command_serves_until_it_is_told_to_stop(base, tmp_path):
    make_icae(base, stirred=0.05).save_pretrained(tmp_path / "checkpoint")
    code = "from icae.serve_cli import serve; import typer; typer.run(serve)"
    command = [sys.executable, "-c", code, "--port", "0", "--model", tmp_path / "checkpoint", "--store", tmp_path / "store"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"running on (http://\S+)", line):
                    break
            import httpx

            assert httpx.get(f"{found[1]}/v1/models").json()["data"][0]["id"] == "checkpoint"
        finally:
            process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode in (0, -signal.SIGTERM)
    assert Path(tmp_path / "store" / "catalogue.sqlite").exists()


# ---- documentation ----

DOCS = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_documents_curl_and_python_run(live, tmp_path):
    (tmp_path / "handbook.txt").write_text(TEXT)
    (script,) = blocks("bash")
    script = "set -e\n" + script.replace("localhost:8000", f"127.0.0.1:{live.port}").replace("curl -s", "echo; curl -sS --fail-with-body")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    context, upload, reply = (json.loads(line) for line in done.stdout.strip().split("\n") if line)
    assert context["name"] == "harbour" and upload["name"] == "handbook.txt" and reply["object"] == "chat.completion"
    (code,) = blocks("python")
    exec(code.replace("http://127.0.0.1:8000", live.url), {})


def test_the_documents_name_every_route(client):
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in DOCS.replace("`DELETE /v1/contexts/{id}`", "/v1/contexts/{id}")
