import dataclasses

import pytest
import torch
from tiny import LINES, make_icae, one_line, random_ids

from icae import focus as room
from icae.chat import chat_prompt
from icae.errors import ICAEError
from icae.focus import asked, chosen, focus, gained, likelihoods, relevant
from icae.objectives import Example, Marker
from icae.slots import MemorySlots
from icae.stepwise import finished


@pytest.fixture
def model(base, kind):
    return make_icae(base, kind=kind, stirred=0.05, focus=4)


def test_relevance_counts_what_a_segment_makes_likelier_and_nothing_else():
    likely, one = torch.full((5, 3), -9.0), [0] * 5
    likely[1, 0], likely[3, 1] = -4.0, -3.0
    assert gained(likely) == [0, 5, 0, 6, 0]
    assert chosen(gained(likely), one, 4) == [1, 3] and chosen(gained(likely), one, 1) == [3]  # the best one last, next to the prompt
    likely[3, 2] = -90.0
    assert chosen(gained(likely), one, 1) == [3]  # one unlikely token is no reason against it
    likely[1, 0] = -6.0
    assert chosen(gained(likely), one, 4) == [3]  # the second best is too far behind
    assert len(chosen([0.0] * 6, one + [0], 4)) == 4


def test_documents_are_left_out_or_read_whole():
    two = [0, 0, 1, 1]
    assert chosen([0, 6, 0, 0], two, 4) == [0, 1]  # the second is six nats behind
    assert chosen([0, 6, 2, 0], two, 4) == [2, 3, 0, 1]  # four, and there is room: the better one stands last
    assert chosen([0, 6, 2, 0], two, 3) == [0, 1]  # there is not
    assert chosen([0, 6, 2, 0], two, 1) == [1]
    assert chosen([0.0] * 3, [0, 1, 2], 4) == [0, 1, 2]  # a request about no place in particular


def test_short_contexts_and_empty_prompts_are_left_alone(model):
    slots = model.compress_ids(random_ids(48))[0]
    assert len(slots.segments) == 3 and focus(model.reader, slots, [5, 6], 3) is slots and focus(model.reader, slots, [], 1) is slots
    model.config = model.config.replace(focus=0)
    assert model.focused(slots, "Who?") is slots


def test_long_contexts_are_narrowed_to_whole_segments_at_places_of_their_own(model, monkeypatch):
    slots, prompt = model.compress_ids(random_ids(90))[0], random_ids(7)[0]
    parts = slots.split()
    single = torch.cat([likelihoods(model.reader, [part], prompt) for part in parts])
    numbers = chosen(gained(single), slots.documents, 2)
    expected = MemorySlots.concatenate([parts[i] for i in numbers], same=True)
    for together, ids in ((1, None), (4, None), (100, None), (4, slots.ids)):  # how many are read at once changes nothing
        monkeypatch.setattr(room, "AT_ONCE", together)
        monkeypatch.setattr(room, "FAINT", 1000.0)  # as if the prompt had nothing in common with the text
        found = focus(model.reader, dataclasses.replace(slots, ids=ids), prompt, 2)
        assert found.segments == expected.segments and torch.equal(found.positions, expected.positions)
        assert all(torch.equal(t, expected.tensors[name]) for name, t in found.tensors.items())


def test_a_prompt_that_names_what_it_is_about_is_read_after_no_segment(model, monkeypatch):
    texts = [f"{LINES[i % len(LINES)]} " * 2 for i in range(6)]
    slots = MemorySlots.concatenate(model.compress([*texts, "Quarrelsome zebras juxtapose lacquered xylophones."]))
    read = []
    monkeypatch.setattr(room, "likelihoods", lambda reader, parts, prompt: read.append(len(parts)) or torch.zeros(len(parts), 3))

    def numbers(prompt, slots=slots):
        read.clear()
        return finished(relevant(model.reader, slots, model.base.encode(prompt), 4))

    last = len(slots.segments) - 1
    assert numbers("What do quarrelsome zebras juxtapose?")[-1] == last and not read
    assert numbers("What do quarrelsome zebras juxtapose?", dataclasses.replace(slots, ids=None)) and sum(read) == last + 1
    assert numbers("Kwik?") and sum(read) == last + 1  # nothing in common


def test_joined_documents_are_known_in_memory_and_on_disk(model, tmp_path):
    one, two = model.compress_ids(random_ids(40, 20))
    assert one.documents == [0, 0, 0] and MemorySlots.concatenate([two]).documents == [0, 0]
    both = MemorySlots.concatenate([MemorySlots.concatenate([one, two]), two])
    assert both.documents == [0, 0, 0, 1, 1, 2, 2]
    both.save(tmp_path / "both.safetensors")
    assert MemorySlots.load(tmp_path / "both.safetensors").documents == both.documents
    assert MemorySlots.concatenate(both.split(), same=True).documents == both.documents
    prompt = random_ids(7)[0]
    found = focus(model.reader, MemorySlots.concatenate([one, two]), prompt, 8)  # there is room for all: whole documents
    kept = [part.tokens for part in found.split()]
    assert kept in (
        [s.tokens for s in pieces] for pieces in (one.segments, two.segments, one.segments + two.segments, two.segments + one.segments)
    )


def test_likelihoods_are_those_of_the_prompt_as_a_continuation(model, monkeypatch):
    part, prompt = model.compress_ids(random_ids(16))[0], random_ids(9)[0]
    (score,) = model.score([part], [Example([], Marker.LM, [], prompt)])
    assert torch.equal(likelihoods(model.reader, [part], prompt)[0], -score.nll)
    monkeypatch.setattr(room, "PROMPT", 4)
    assert likelihoods(model.reader, [part], prompt).shape == (1, 4)


def test_every_way_to_ask_reads_the_same_segments(model):
    model.config = model.config.replace(focus=1)
    slots = model.compress_ids(random_ids(60))[0]
    narrow = model.focused(slots, LINES[3])
    assert len(narrow.segments) == 1 < len(slots.segments)
    alone = model.reader.collect([narrow], [chat_prompt(model.base.tokenizer, LINES[3])], Marker.FT, [6])[0]
    expected = model.base.decode(alone).strip()
    assert model.answer(slots, LINES[3], max_new_tokens=6) == expected
    assert model.answers([slots, narrow], [LINES[3]] * 2, max_new_tokens=6) == [expected] * 2


def test_what_was_narrowed_once_stays_as_it_is(model, monkeypatch):
    """`icae ask` tells how much it asks before it asks."""
    monkeypatch.setattr(room, "MARGIN", 1000.0)  # all documents stay, in another order perhaps
    slots = MemorySlots.concatenate(model.compress_ids(random_ids(16, 20, 9)))
    once = model.focused(slots, "Who?")
    assert set(slots.documents) == {0, 1, 2} and len(once.segments) == len(slots.segments)
    assert model.focused(once, "Who?") is once


def test_a_context_may_be_longer_than_the_base_has_positions(model):
    slots = model.compress_ids(random_ids(model.base.max_positions + 100))[0]
    assert model.answer(slots, "Who?", max_new_tokens=4) == model.answer(model.focused(slots, "Who?"), "Who?", max_new_tokens=4)
    model.config = model.config.replace(focus=0)
    with pytest.raises(ICAEError) as error:
        model.answer(slots, "Who?", max_new_tokens=4)
    one_line(error.value, "positions")


def test_the_user_s_last_two_turns_are_what_is_asked():
    said = [("system", "s"), ("user", "a"), ("assistant", "x"), ("user", "b"), ("assistant", "y"), ("user", "c")]
    assert asked([{"role": role, "content": content} for role, content in said]) == "b\nc"
