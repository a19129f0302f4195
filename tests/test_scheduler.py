import queue
import random
import threading
import time

import pytest
import torch
from tiny import make_icae, random_ids

from icae import beginnings as library
from icae.errors import ICAEError
from icae.objectives import Marker
from icae.reader import GREEDY, Sampling
from icae.server import answer as answer_room
from icae.server import prefix as prefix_room
from icae.server.answer import Answer
from icae.server.batch import Batch
from icae.server.prefix import Prefixes, prefill
from icae.server.row import Row
from icae.server.scheduler import LONG, PREPARING, Closing, Done, Failed, Full, Job, Scheduler, Token
from icae.slots import MemorySlots
from icae.stepwise import finished


def begin(model, ids, slots=None, limit=12, sampling=GREEDY, marker=Marker.FT, **several):
    """The work of one generation, as a generator."""
    prefix = None if slots is None else Prefixes(model, 1 << 30).put("x", slots)
    prompt = model.base.embed(torch.tensor(ids, dtype=torch.long))
    row = yield from prefill(model, prefix, None if slots is None else marker, prompt, limit, sampling)
    return Answer(row, **several)


def begun(work):
    """The row of an answer that has its first token."""
    made = finished(work)
    return Answer(made).row if isinstance(made, Row) else made.row


def alone(model, ids, slots=None, limit=12, sampling=GREEDY):
    """What the library makes of the same request, one at a time."""
    marker = None if slots is None else Marker.FT
    return model.reader.collect(None if slots is None else [slots], [ids], marker, [limit], sampling)[0]


def requests(model, count, seed=0):
    chance = random.Random(seed)
    made = []
    for i in range(count):
        ids = random_ids(chance.randint(1, 30), seed=i)[0]
        slots = model.compress_ids(random_ids(chance.randint(2, 60), seed=100 + i))[0] if chance.random() < 0.7 else None
        sampling = Sampling(0.8, 0.9, seed=i) if i % 3 == 2 else GREEDY
        made.append({"ids": ids, "slots": slots, "limit": chance.randint(1, 25), "sampling": sampling})
    return made


def guess_now_and_then_wrongly(monkeypatch, answers):
    """Have every row guess what its answer goes on with: as many tokens as its last id says, and as often wrongly."""

    def guess(row, most):
        due = next(a for a in answers if a[: len(row.ids)] == row.ids)
        right = due[len(row.ids) : len(row.ids) + min(most, row.ids[-1] % 5, row.limit - len(row.ids) - 1)]
        return [*right[:-1], (right[-1] + row.ids[-1] % 2) % 300] if right else []

    monkeypatch.setattr(Row, "guess", guess)


@pytest.fixture
def model(base, kind):
    return make_icae(base, kind=kind, stirred=0.05)


@pytest.mark.parametrize("guesses", [0, 3])
def test_rows_that_join_and_leave_answer_as_alone(model, monkeypatch, guesses):
    monkeypatch.setattr(prefix_room, "PREFILL", 7)
    asked = requests(model, 14)
    batch, waiting, rows, steps = Batch(model, guesses), list(range(14)), {}, 0
    while waiting or batch.rows:
        if waiting and (steps % 3 == 0 or not batch.rows):
            i = waiting.pop(0)
            rows[i] = begun(begin(model, **asked[i]))
            if rows[i].finished is None:
                batch.join(rows[i])
        if batch.rows:
            batch.step()
        steps += 1
        for row in [r for r in batch.rows if r.finished is not None]:
            batch.leave(row)
    assert [rows[i].ids for i in range(14)] == [alone(model, **a) for a in asked]
    assert {r.finished for r in rows.values()} >= {"length"}
    assert batch.layers == []


@pytest.mark.parametrize("shares", [True, False])
def test_rows_that_share_contexts_answer_as_alone(model, monkeypatch, shares):
    """Rows of three contexts of uneven length, and of none, come and go; each context stands once, and goes with its last row."""
    monkeypatch.setattr(prefix_room, "shareable", lambda base: shares)
    prefixes, asked = Prefixes(model, 1 << 30), requests(model, 18, seed=3)
    contexts = [model.compress_ids(random_ids(n, seed=n))[0] for n in (24, 57, 90)]
    made = [prefixes.put(str(i), slots) for i, slots in enumerate(contexts)]
    batch, rows, waiting, held = Batch(model, 2), [], list(range(18)), set()
    while waiting or batch.rows:
        for i in waiting[:2]:
            prefix = (*made, None)[i % 4]
            asked[i]["slots"] = None if prefix is None else contexts[i % 4]
            prompt = model.base.embed(torch.tensor(asked[i]["ids"]))
            marker = None if prefix is None else Marker.FT
            rows.append(begun(prefill(model, prefix, marker, prompt, asked[i]["limit"], asked[i]["sampling"])))
            if rows[-1].finished is None:
                batch.join(rows[-1])
        del waiting[:2]
        if batch.rows:
            batch.step()
        for row in [r for r in batch.rows if r.finished is not None]:
            batch.leave(row)
        reading = [sum(r.context is c for r in batch.rows) for c in batch.contexts.held]
        assert reading == batch.contexts.readers and 0 not in reading
        held.add(len(reading))
    assert [r.ids for r in rows] == [alone(model, **a) for a in asked]
    assert held == ({0, 1, 2, 3} if shares else {0}) and not batch.contexts.layers


def test_a_context_that_several_rows_read_takes_its_memory_once(model):
    slots = model.compress_ids(random_ids(200))[0]
    prefix = Prefixes(model, 1 << 30).put("x", slots)
    batch = Batch(model)
    for i in range(4):
        prompt = model.base.embed(torch.tensor(random_ids(6, seed=i)[0]))
        batch.join(begun(prefill(model, prefix, Marker.FT, prompt, 8, GREEDY)))
    batch.step()
    assert batch.layers[0].keys.shape[2] < slots.count and not batch.contexts.bytes


@pytest.mark.parametrize("guesses", [0, 4])
def test_families_with_sliding_windows_answer_as_alone(family_base, monkeypatch, guesses):
    model = make_icae(family_base, kind="embedding", stirred=0.05)
    asked = [{**r, "limit": 30} for r in requests(model, 5)]
    guess_now_and_then_wrongly(monkeypatch, [alone(model, **a) for a in asked])
    batch, rows = Batch(model, guesses), [begun(begin(model, **a)) for a in asked]
    for row in rows:
        if row.finished is None:
            batch.join(row)
            batch.step()
            for r in [r for r in batch.rows if r.finished is not None]:
                batch.leave(r)
    while batch.rows:
        batch.step()
        for row in [r for r in batch.rows if r.finished is not None]:
            batch.leave(row)
    assert [r.ids for r in rows] == [alone(model, **a) for a in asked]


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ICAEError, match="512; shorten"):
        begun(begin(model, random_ids(500)[0], limit=13))
    with pytest.raises(ICAEError, match="empty"):
        begun(begin(model, []))


def test_hot_prefixes_are_kept_within_bytes(model):
    slots = [model.compress_ids(random_ids(n))[0] for n in (40, 40, 40)]
    size = Prefixes(model, 1 << 30).put("a", slots[0]).bytes
    kept = Prefixes(model, 2 * size)
    kept.put("a", slots[0]), kept.put("b", slots[1]), kept.get("a"), kept.put("c", slots[2])
    assert list(kept.kept) == ["a", "c"] and kept.bytes == 2 * size and (kept.hits, kept.misses) == (1, 0)
    assert kept.get("b") is None
    kept.drop("a")
    assert kept.bytes == size
    none = Prefixes(model, size - 1)
    none.put("a", slots[0])
    assert none.bytes == 0 and not none.kept


def test_the_buffer_holds_what_the_answers_may_need_and_no_more(model):
    batch, row = Batch(model), begun(begin(model, random_ids(100)[0], limit=10))
    batch.join(row)
    while row.finished is None:
        batch.step()
        assert batch.layers[0].keys.shape[2] <= 100 + 10
    assert row.ids == alone(model, random_ids(100)[0], limit=10)


def test_reading_a_prompt_leaves_its_prefix_as_it_was(model):
    slots = model.compress_ids(random_ids(40))[0]
    prefix = Prefixes(model, 1 << 30).put("x", slots)
    before = [t.clone() for pair in prefix.layers for t in pair]
    prompt = model.base.embed(torch.tensor(random_ids(9)[0]))
    made = [begun(prefill(model, prefix, Marker.FT, prompt, 8, GREEDY)) for _ in range(2)]
    batch = Batch(model)
    for row in made:
        batch.join(row)
    batch.step()
    assert made[0].ids == made[1].ids and all(map(torch.equal, before, (t for pair in prefix.layers for t in pair)))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, 0.9, seed=5)])
@pytest.mark.parametrize("wrong", [0, 1, 3, 9])
def test_guesses_change_no_answer_and_save_steps_where_they_are_right(model, monkeypatch, sampling, wrong):
    """Of the guesses of each step, the one at place `wrong` is."""
    ids, slots = random_ids(5)[0], model.compress_ids(random_ids(40))[0]
    due, steps = alone(model, ids, slots, 40, sampling), 0
    batch, row = Batch(model, 4), begun(begin(model, ids, slots, 40, sampling))

    def guess(row, most):
        n = len(row.ids)
        return [i if at != wrong else (i + 1) % 300 for at, i in enumerate(due[n : min(n + most, row.limit - 1)])]

    monkeypatch.setattr(Row, "guess", guess)
    batch.join(row)
    while row.finished is None:
        batch.step()
        steps += 1
        assert batch.layers[0].keys.shape[2] <= slots.count + 2 + 5 + 40
    assert row.ids == due
    assert steps == -(-(len(due) - 1) // (1 + min(wrong, 4))) + (row.finished == "stop" and not (len(due) - 1) % (1 + min(wrong, 4)))


def test_rows_that_guess_together_answer_as_alone_and_their_gaps_are_closed(model, monkeypatch):
    asked = [{**r, "limit": 150, "sampling": GREEDY} for r in requests(model, 4)]
    answers, sizes = [alone(model, **a) for a in asked], []
    guess_now_and_then_wrongly(monkeypatch, answers)
    batch, rows = Batch(model, 4), [begun(begin(model, **a)) for a in asked]
    for row in rows:
        batch.join(row)
    while batch.rows:
        batch.step()
        sizes.append((batch.end - batch.low, max(batch.counts)))
        assert batch.read[: len(batch.rows)].sum(1).tolist() == batch.counts
        for row in [r for r in batch.rows if r.finished is not None]:
            batch.leave(row)
    assert [r.ids for r in rows] == answers
    assert len(sizes) < max(map(len, answers)) - 1 and any(span > own for span, own in sizes)
    assert all(span <= own * 5 // 4 + 64 + 5 for span, own in sizes)


def test_a_full_batch_guesses_little_so_that_a_step_stays_short(model):
    batch, asked = Batch(model, 8), []
    for count in (1, 2, 8, 40):
        batch.rows = [None] * count
        asked.append(batch._ahead())
    assert asked == [8, 8, 4, 0]


def test_guesses_are_what_came_next_before(model):
    row = begun(begin(model, [5, 6, 7, 8, 5, 9], limit=30))
    row.prompt, row.ids = [1, 2, 3, 4, 5, 9, 2, 3], [6, 5, 9]
    assert row.guess(3) == [2, 3, 6] and row.guess(0) == []
    row.ids = [1, 2, 3]
    assert row.guess(2) == [4, 5]  # three ids in a row count more than two that came later
    row.ids = [9, 9]
    assert row.guess(3) == []
    row.ids, row.limit = [1, 2], 4
    assert row.guess(3) == [3]  # one more is chosen after it


def counted(model, monkeypatch, work):
    """A finished generation's row, and how many input embeddings the base read for it."""
    read, forward = [], model.base.model.forward
    monkeypatch.setattr(model.base.model, "forward", lambda **kw: (read.append(kw["inputs_embeds"].shape[1]), forward(**kw))[1])
    row = begun(work)
    monkeypatch.setattr(model.base.model, "forward", forward)
    return row, sum(read)


def test_what_a_prompt_has_in_common_with_the_last_one_is_not_read_again(model, monkeypatch):
    slots, lead = model.compress_ids(random_ids(40))[0], model.config.marker_length
    first, other = random_ids(20)[0], random_ids(20)[0][:12] + random_ids(7, seed=2)[0]
    prefixes = Prefixes(model, 1 << 30)

    def ask(ids, marker=Marker.FT, reader="a"):
        prefix = (prefixes.get("x") or prefixes.put("x", slots)).towards(reader)
        prompt = model.base.embed(torch.tensor(ids))
        row, read = counted(model, monkeypatch, prefill(model, prefix, marker, prompt, 12, GREEDY, ids))
        logits = row.logits
        prefixes.follow("x", prefix, marker, ids, row)
        assert prefixes.bytes == prefixes.kept["x"].bytes
        torch.testing.assert_close(logits, begun(begin(model, ids, slots, marker=marker)).logits, atol=1e-4, rtol=0)
        return read

    assert ask(first) == lead + 20
    assert ask(other) == 7
    assert ask(other) == 1
    assert ask(first) == 8
    assert ask(first, reader="b") == 20
    assert ask(first, Marker.LM) == lead + 20
    prefixes.drop("x")
    prefix = prefixes.put("y", slots)
    row = begun(prefill(model, prefix, Marker.FT, model.base.embed(torch.tensor(first)), 12, GREEDY, first))
    prefixes.follow("x", prefix, Marker.FT, first, row)  # was dropped meanwhile
    assert list(prefixes.kept) == ["y"]
    monkeypatch.setattr(prefix_room, "FOLLOWED", 5)
    prefixes.follow("y", prefix, Marker.FT, first, row)
    assert prefixes.kept["y"].followed[0][0].shape[2] == lead + 5 and prefixes.kept["y"].read == tuple(first[:5])


# ---- the thread ----


@pytest.fixture
def scheduler(base):
    model = make_icae(base, stirred=0.05)
    made = Scheduler(model, max_rows=4, max_queue=3)
    made.model = model
    made.start()
    yield made
    made.close(5)
    assert not made.thread.is_alive()


class Inbox:
    def __init__(self):
        self.events = queue.Queue()
        self.put = self.events.put

    def rest(self, timeout=20):
        """All events up to the last one."""
        made = []
        while not made or isinstance(made[-1], Token):
            made.append(self.events.get(timeout=timeout))
        return made


def pieces(count, log=None, name="", value=None, gate=None):
    """Work that is no generation: `count` pieces, noted in `log`."""
    for _ in range(count):
        if gate is not None:
            gate.wait(20)
        if log is not None:
            log.append(name)
        yield
    return value


def test_many_clients_at_once_get_what_each_would_get_alone(scheduler):
    model, asked = scheduler.model, requests(scheduler.model, 24, seed=5)
    expected, got = [alone(model, **a) for a in asked], {}

    def client(i):
        inbox = Inbox()
        while True:
            try:
                scheduler.submit(Job(begin(model, **asked[i]), inbox.put, tenant=str(i % 3)))
                break
            except Full:
                time.sleep(0.01)
        events = inbox.rest()
        assert isinstance(events[-1], Done)
        tokens = [e.ids for e in events[:-1]]
        assert [len(t) for t in tokens] == list(range(1, len(tokens) + 1))  # one at a time, none lost
        got[i] = tokens[-1] if tokens else []

    threads = [threading.Thread(target=client, args=(i,)) for i in range(24)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert [got[i] for i in range(24)] == expected
    assert scheduler.step_rows > 1.5 * scheduler.steps  # they did run together
    assert scheduler.active == scheduler.queued == 0 and scheduler.batch.layers == []


@pytest.mark.parametrize("length", [3, 24])
def test_answers_that_are_begun_in_several_ways_are_the_librarys(base, monkeypatch, length):
    """Beside others, with rows that end among their beginnings, that are compared as soon as they have begun, or go on behind that."""
    monkeypatch.setattr(library, "LENGTH", length)
    monkeypatch.setattr(answer_room, "LENGTH", length)
    model = make_icae(base, stirred=0.05, grounding=1)
    slots, prompts = model.compress_ids(random_ids(*[30] * 9, seed=3)), random_ids(*range(3, 12))
    plain = model.reader.collect(slots, prompts, Marker.FT, [12] * 9)
    monkeypatch.setattr(type(base), "eos_ids", [*base.eos_ids, plain[0][4], plain[3][1], plain[5][9]])
    monkeypatch.setattr(Row, "guess", lambda row, most: row.ids[-1:] * min(most, row.limit - len(row.ids) - 1, 2))
    counts, limits = [1, 3, 4] * 3, [12, 1, 12, 5, 12, 12, 12, 7, 12]
    words = [model.words(s.ids) for s in slots]
    doubts = [lambda ids: float(ids[0] % 3)] * 9
    expected = [
        model.reader.collect([s], [p], Marker.FT, [n], guides=[model.guide(w)], beginnings=many, doubts=[doubt])[0]
        for s, p, n, w, many, doubt in zip(slots, prompts, limits, words, counts, doubts, strict=True)
    ]

    def work(s, ids, limit, w, many, doubt):
        prompt = model.base.embed(torch.tensor(ids))
        row = yield from prefill(model, Prefixes(model, 1 << 30).put("x", s), Marker.FT, prompt, limit, GREEDY, ids, model.guide(w))
        return Answer(row, many, doubt)

    scheduler, inboxes = Scheduler(model, max_rows=6, max_queue=9, guesses=3), [Inbox() for _ in range(9)]
    scheduler.start()
    for inbox, asked in zip(inboxes, zip(slots, prompts, limits, words, counts, doubts, strict=True), strict=True):
        scheduler.submit(Job(work(*asked), inbox.put))
    events = [inbox.rest() for inbox in inboxes]
    scheduler.close(5)
    assert all(isinstance(made[-1], Done) for made in events)
    said = [[e.ids for e in made[:-1]] for made in events]
    assert [tokens[-1] for tokens in said] == expected
    assert all(after[: len(before)] == before for tokens in said for before, after in zip(tokens, tokens[1:], strict=False))
    greedy = model.reader.collect(slots, prompts, Marker.FT, limits, guides=[model.guide(w) for w in words])
    assert sum(a != b for a, b in zip(expected, greedy, strict=True)) >= 3
    assert scheduler.active == 0 and scheduler.batch.layers == [] and not scheduler.batch.contexts.held


def test_the_rows_of_answers_that_begin_in_several_ways_count_as_such(base, monkeypatch):
    monkeypatch.setattr(type(base), "eos_ids", [])
    model = make_icae(base, stirred=0.05)
    idle = Scheduler(model, max_rows=6, max_queue=9)
    for i in range(9):
        idle.submit(Job(begin(model, [5, 6 + i], limit=40, beginnings=3), lambda event: None))
    rows = []
    for _ in range(12):
        idle._admit(), idle._prepare(), idle._step()
        rows.append(len(idle.batch.rows))
    assert 3 < max(rows) <= 6 + 2 * PREPARING and idle.queued


def test_one_that_goes_away_while_it_begins_takes_all_its_rows_along(base, monkeypatch):
    monkeypatch.setattr(type(base), "eos_ids", [])
    model = make_icae(base, stirred=0.05)
    idle, told = Scheduler(model, max_rows=4, max_queue=9), []
    going = Job(begin(model, [5, 6], limit=400, beginnings=3), told.append)
    idle.submit(going)
    idle.submit(Job(begin(model, [5, 6, 7], limit=400), lambda event: None))
    for _ in range(4):
        idle._admit(), idle._prepare(), idle._step()
    assert len(idle.batch.rows) == 4 and not told
    going.cancel()
    idle._forget()
    assert len(idle.batch.rows) == len(idle.running) == 1


def test_a_generation_goes_on_while_another_job_prepares(scheduler):
    log, inbox, other = [], Inbox(), Inbox()
    scheduler.submit(Job(begin(scheduler.model, random_ids(5)[0], limit=60), lambda e: (log.append("token"), inbox.put(e))))
    scheduler.submit(Job(pieces(20, log, "piece"), other.put))
    inbox.rest(), other.rest()
    first, last = log.index("piece"), len(log) - 1 - log[::-1].index("piece")
    assert log[first:last].count("token") >= 10


def test_while_more_wait_than_generate_those_who_are_ready_begin_together(base):
    model = make_icae(base, stirred=0.05)
    idle, running = Scheduler(model, max_rows=9, max_queue=9), []
    for i in range(7):
        idle.submit(Job(begin(model, random_ids(5, seed=i)[0], limit=20), lambda event: None))
    idle.submit(Job(pieces(3), lambda event: None))
    for _ in range(6):
        idle._admit(), idle._prepare()
        running.append(len(idle.running))
    assert running == [4, 5, 6, 7, 7, 7]


def test_long_jobs_keep_no_place_from_young_ones_and_take_every_second_piece(base):
    """Once there was room for four, whoever they were, until one ended."""
    idle, log = Scheduler(make_icae(base), max_rows=8, max_queue=9), []
    for _ in range(6):
        idle.submit(Job(pieces(10**6, log, "long"), lambda event: None, tenant="greedy"))

    def turns(count):
        for _ in range(count):
            idle._admit(), idle._prepare()

    turns(8 * LONG)
    assert len(idle.preparing) == 4 and idle.queued == 2  # of one tenant, half of the rows
    ended = []
    for name in "ab":
        idle.submit(Job(pieces(9, log, name), ended.append, tenant=name))
    log.clear()
    turns(40)
    assert len(ended) == 2
    last = max(i for i, name in enumerate(log) if name != "long")
    assert log[:4] == ["a", "long", "b", "long"]
    assert all((name == "long") == bool(i % 2) for i, name in enumerate(log[: last + 1])) and log.count("long") >= 18


def test_jobs_in_preparation_are_bounded(base):
    idle = Scheduler(make_icae(base), max_rows=2, max_queue=9)
    for i in range(9):
        for _ in range(2):
            idle.submit(Job(pieces(10**6), lambda event: None, tenant=str(i)))
    for _ in range(12 * LONG):
        idle._admit(), idle._prepare()
        assert sum(not job.long for job in idle.preparing) <= 2
    assert [job.tenant for job in sorted(idle.preparing, key=lambda job: job.made)] == [str(i) for i in range(2 + PREPARING)]


def test_tenants_take_turns(scheduler):
    log, gate, inboxes = [], threading.Event(), []
    for name, count in [("gate", 1), *[("greedy", 3)], ("modest", 1)]:
        for _ in range(count * (4 if name == "gate" else 1)):
            inboxes.append(Inbox())
            scheduler.submit(
                Job(pieces(1, log, name, gate=gate), inboxes[-1].put, tenant="gate" + str(len(inboxes)) if name == "gate" else name)
            )
    gate.set()
    [i.rest() for i in inboxes]
    assert log[:4] == ["gate"] * 4 and log.index("modest") <= 5


def test_a_full_queue_refuses_one_tenant_and_not_the_others(scheduler):
    gate, inbox = threading.Event(), Inbox()
    for i in range(4):
        scheduler.submit(Job(pieces(1, gate=gate), inbox.put, tenant=f"t{i}"))
    time.sleep(0.1)
    for _ in range(3):
        scheduler.submit(Job(pieces(1), inbox.put, tenant="a"))
    with pytest.raises(Full) as full:
        scheduler.submit(Job(pieces(1), inbox.put, tenant="a"))
    assert full.value.retry_after >= 1
    scheduler.submit(Job(pieces(1), inbox.put, tenant="b"))
    gate.set()
    for _ in range(8):
        assert isinstance(inbox.events.get(timeout=10), Done)


def test_cancelled_jobs_stop_wherever_they_are(scheduler):
    closed, gate, inbox = threading.Event(), threading.Event(), Inbox()

    def work():
        try:
            while True:
                gate.wait(20)
                yield
        finally:
            closed.set()

    preparing = Job(work(), inbox.put)
    running = Job(begin(scheduler.model, [5, 6], limit=400), inbox.put)
    scheduler.submit(preparing), scheduler.submit(running)
    gate.set()
    inbox.events.get(timeout=10)
    preparing.cancel(), running.cancel()
    assert closed.wait(10)
    deadline = time.monotonic() + 10
    while scheduler.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert scheduler.active == 0 and not scheduler.batch.rows


def test_a_sink_that_is_gone_cancels(scheduler):
    def sink(event):
        raise RuntimeError("the loop is closed")

    job = Job(begin(scheduler.model, [5, 6], limit=400), sink)
    scheduler.submit(job)
    deadline = time.monotonic() + 10
    while not (job.cancelled and scheduler.active == 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.cancelled and not scheduler.batch.rows


def test_jobs_that_take_too_long_fail(scheduler):
    def slow():
        while True:
            time.sleep(0.01)
            yield

    inbox = Inbox()
    scheduler.submit(Job(slow(), inbox.put, timeout=0.05))
    (event,) = inbox.rest()
    assert isinstance(event, Failed) and event.status == 504


def test_errors_fail_their_own_job_alone(scheduler):
    def bad(error):
        yield
        raise error

    first, second, third = Inbox(), Inbox(), Inbox()
    scheduler.submit(Job(bad(ICAEError("mend this")), first.put))
    scheduler.submit(Job(bad(RuntimeError("secret")), second.put))
    scheduler.submit(Job(begin(scheduler.model, [5, 6]), third.put))
    assert first.rest() == [Failed(400, "mend this")]
    (event,) = second.rest()
    assert event.status == 500 and "secret" not in event.message
    assert isinstance(third.rest()[-1], Done)


def test_a_step_that_breaks_fails_its_rows_and_the_next_work(scheduler, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(scheduler.batch, "step", lambda: 1 / 0)
        inbox = Inbox()
        scheduler.submit(Job(begin(scheduler.model, [5, 6], limit=30), inbox.put))
        assert inbox.rest()[-1].status == 500
    inbox = Inbox()
    scheduler.submit(Job(begin(scheduler.model, [5, 6], limit=30), inbox.put))
    assert isinstance(inbox.rest()[-1], Done)


def test_a_defect_of_the_thread_s_own_fails_what_is_there_and_the_next_works(scheduler, monkeypatch):
    inbox, forget = Inbox(), scheduler._forget
    gate = threading.Event()

    def broken():
        if gate.is_set():
            gate.clear()
            raise RuntimeError("secret")
        forget()

    monkeypatch.setattr(scheduler, "_forget", broken)
    gate.set()
    scheduler.submit(Job(begin(scheduler.model, [5, 6], limit=400), inbox.put))
    (event,) = inbox.rest()
    assert event == Failed(500, "the server made a mistake; it is in its log")
    scheduler.submit(Job(begin(scheduler.model, [5, 6], limit=30), inbox.put))
    assert isinstance(inbox.rest()[-1], Done) and scheduler.alive


def test_closing_finishes_what_runs_and_takes_nothing_new(scheduler):
    inbox = Inbox()
    for _ in range(3):
        scheduler.submit(Job(begin(scheduler.model, [5, 6], limit=40), inbox.put))
    scheduler.close(20)
    assert [type(inbox.rest()[-1]) for _ in range(3)] == [Done] * 3
    with pytest.raises(Closing):
        scheduler.submit(Job(pieces(1), inbox.put))


def test_closing_fails_what_does_not_end(scheduler):
    stop, inbox = threading.Event(), Inbox()

    def endless():
        while not stop.is_set():
            time.sleep(0.01)
            yield

    scheduler.submit(Job(endless(), inbox.put))
    time.sleep(0.05)
    scheduler.close(0.1)
    assert inbox.rest()[-1].status == 503
    stop.set()


def test_slots_of_several_contexts_are_one_prefix(model):
    parts = [model.compress_ids(random_ids(n, seed=n))[0] for n in (20, 33)]
    joined = MemorySlots.concatenate(parts)
    assert begun(begin(model, [5, 6, 7], joined, limit=1)).ids == alone(model, [5, 6, 7], joined, limit=1)
