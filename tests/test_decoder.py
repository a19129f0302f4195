import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny import base_logits, make_icae, prefix_as_slots, prefix_cache, random_ids

from icae.decoder import Decoder
from icae.objectives import Marker, padded
from icae.reader import GREEDY
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots, Origin, Segment


def inputs(base, rows, first=0):
    """(embeddings, positions, mask) of plain ids, padded on the right; every row begins at its own `first`."""
    lengths = torch.tensor([len(r) for r in rows])
    steps = torch.arange(int(lengths.max()))
    starts = torch.as_tensor(first).expand(len(rows))
    return base.embed(padded(rows)), starts[:, None] + steps, steps[None] < lengths[:, None]


def generate(base, slots, rows, count, first=0, **options):
    made = [[] for _ in rows]
    for step in Decoder(base).generate(slots, *inputs(base, rows, first), [count] * len(rows), **options):
        for row, new in zip(made, step, strict=True):
            row += [] if new is None else [new]
    return made


def own_generate(base, ids, count, **options):
    """What transformers' own greedy `generate` makes of plain ids, without the end."""
    made = base.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=1, **options)[
        0, len(ids) :
    ].tolist()
    return made[: made.index(1)] if 1 in made else made


def embeddings_as_slots(base, ids):
    """The base's own input embeddings of plain ids, as embedding slots at ratio 1."""
    origin = Origin("embedding", 1, "appended", base.name, base.fingerprint, "none")
    return MemorySlots({"embeddings": base.embed(torch.tensor(ids))}, torch.arange(len(ids)), (Segment(*[len(ids)] * 3),), origin)


AS_SLOTS = {"kv": prefix_as_slots, "embedding": embeddings_as_slots}


def read(base, slots, rows, first, keep=0):
    with torch.no_grad():
        return Decoder(base).read(slots, *inputs(base, rows, first), keep)[0]


def test_reading_the_text_itself_as_slots_equals_reading_the_text(base, kind):
    context, prompt = random_ids(13, 6)
    logits = read(base, SlotBatch.pad([AS_SLOTS[kind](base, context)]), [prompt], len(context))
    torch.testing.assert_close(logits[0], base_logits(base, context + prompt)[13:], atol=1e-4, rtol=0)


def test_a_joined_part_reads_as_if_it_had_been_encoded_further_on(base):
    a, b, prompt = random_ids(7, 9, 5)
    joined = MemorySlots.concatenate([prefix_as_slots(base, a), prefix_as_slots(base, b)])
    further_on = prefix_cache(base, b, first=7)
    by_hand = dataclasses.replace(joined, tensors={n: torch.cat([t, further_on[n]]) for n, t in prefix_cache(base, a).items()})
    torch.testing.assert_close(joined.tensors["keys"], by_hand.tensors["keys"], atol=1e-5, rtol=0)
    torch.testing.assert_close(*(read(base, SlotBatch.pad([s]), [prompt], 16) for s in (joined, by_hand)), atol=1e-4, rtol=0)


def test_shifting_slots_equals_encoding_at_shifted_positions(base):
    (ids,) = random_ids(12)
    for by in (1, 17, 100):
        shifted, moved = prefix_as_slots(base, ids).shifted(by), prefix_as_slots(base, ids, first=by)
        assert torch.equal(shifted.positions, moved.positions)
        torch.testing.assert_close(shifted.tensors["keys"], moved.tensors["keys"], atol=1e-5, rtol=0)
        torch.testing.assert_close(shifted.tensors["values"], moved.tensors["values"], atol=1e-5, rtol=0)


def test_without_slots_the_decoder_generates_what_the_base_generates(base):
    for ids in random_ids(1, 5, 20):
        assert generate(base, None, [ids], 24) == [own_generate(base, ids, 24)]


def test_from_a_texts_own_slots_the_decoder_generates_what_the_base_generates_from_the_text(base, kind):
    context, prompt = random_ids(13, 4)
    slots = SlotBatch.pad([AS_SLOTS[kind](base, context)])
    assert generate(base, slots, [prompt], 24, first=13) == [own_generate(base, context + prompt, 24)]


@pytest.mark.parametrize("with_slots", [False, True])
def test_a_batch_generates_what_its_rows_generate_alone(base, kind, with_slots):
    contexts, prompts = random_ids(13, 4, 8), random_ids(2, 7, 1, seed=2)
    slots = [AS_SLOTS[kind](base, c) for c in contexts] if with_slots else None
    starts = [len(c) if with_slots else 0 for c in contexts]
    together = generate(base, SlotBatch.pad(slots) if slots else None, prompts, 16, first=torch.tensor(starts))
    for i, prompt in enumerate(prompts):
        alone = generate(base, SlotBatch.pad([slots[i]]) if slots else None, [prompt], 16, first=starts[i])
        assert [together[i]] == alone
    assert len({tuple(row) for row in together}) == 3


def test_logits_do_not_depend_on_neighbours_or_padding(base, kind):
    contexts, prompts = random_ids(13, 4), random_ids(2, 7, seed=2)
    slots = [AS_SLOTS[kind](base, c) for c in contexts]
    together = read(base, SlotBatch.pad(slots), prompts, torch.tensor([13, 4]))
    for i, prompt in enumerate(prompts):
        alone = read(base, SlotBatch.pad([slots[i]]), [prompt], len(contexts[i]))[0]
        torch.testing.assert_close(together[i, : len(prompt)], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_slots", [False, True])
def test_kept_logits_are_those_of_their_places(base, kind, with_slots):
    context, prompt = random_ids(13, 6)
    slots = SlotBatch.pad([AS_SLOTS[kind](base, context)]) if with_slots else None
    every, kept = (read(base, slots, [prompt], 13, keep) for keep in (0, torch.tensor([1, 4])))
    assert every.shape == (1, 6, 320)
    torch.testing.assert_close(kept, every[:, [1, 4]], atol=1e-5, rtol=0)


def test_a_row_ends_at_its_stop_or_its_limit_and_its_neighbours_go_on(base):
    prompts = random_ids(5, 3)
    free = generate(base, None, prompts, 12, stop=[])
    assert [len(row) for row in free] == [12, 12]
    stop = free[0][4]
    assert stop not in free[0][:4] and stop not in free[1]
    assert generate(base, None, prompts, 12, stop=[stop]) == [free[0][:4], free[1]]
    steps = list(Decoder(base).generate(None, *inputs(base, prompts), [2, 5], stop=[]))
    assert [s[0] for s in steps] == [*free[0][:2], None, None, None]
    assert [s[1] for s in steps] == free[1][:5]
    assert not list(Decoder(base).generate(None, *inputs(base, prompts), [0, 0]))


def test_rows_that_go_on_are_what_they_are_alone_after_others_have_left_the_batch(base, kind):
    limits = [2, 9, 1, 5, 12, 1]
    model = make_icae(base, kind=kind, stirred=0.05)
    slots = model.compress_ids(random_ids(20, 9, 14, 30, 5, 11))
    prompts = random_ids(4, 7, 3, 9, 5, 6, seed=2)
    sizes, forward = [], base.model.forward
    with pytest.MonkeyPatch.context() as m:
        m.setattr(base.model, "forward", lambda *a, **k: sizes.append(len(k["attention_mask"])) or forward(*a, **k))
        together = model.reader.collect(slots, prompts, Marker.FT, limits, GREEDY)
    alone = [model.reader.collect([s], [p], Marker.FT, [n], GREEDY)[0] for s, p, n in zip(slots, prompts, limits, strict=True)]
    assert together == alone
    assert sizes[0] == 6 and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


def test_the_bases_own_eos_ends_a_row(base, monkeypatch):
    (ids,) = random_ids(5)
    first, second = generate(base, None, [ids], 2, stop=[])[0]
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", [1, second])
    assert generate(base, None, [ids], 8) == [[first]]
    other = dataclasses.replace(base, tokenizer=SimpleNamespace(eos_token_id=first))
    assert generate(other, None, [ids], 8) == [[]]


def test_sampling_follows_its_seed_and_a_narrow_nucleus_is_greedy(base):
    (ids,) = random_ids(5)
    draw = lambda **o: generate(base, None, [ids], 16, stop=[], **o)  # noqa: E731
    assert draw(temperature=1.0, seed=3) == draw(temperature=1.0, seed=3)
    assert draw(temperature=1.0, seed=3) != draw(temperature=1.0, seed=4)
    assert draw(temperature=1.0, top_p=1e-6, seed=3) == draw()
    assert draw(temperature=1e-4, seed=3) == draw()


def test_gradient_flows_from_logits_to_slots_and_not_to_the_base(base, kind):
    context, prompt = random_ids(6, 3)
    slots = SlotBatch.pad([AS_SLOTS[kind](base, context)])
    leaves = [t.requires_grad_() for t in slots.tensors.values()]
    Decoder(base).read(slots, *inputs(base, [prompt], 6))[0].pow(2).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.flatten(1).norm(dim=1).min() > 0 for leaf in leaves)
    assert all(p.grad is None for p in base.model.parameters())


def test_a_trained_adapter_changes_nothing_in_the_decoder(base):
    (ids,) = random_ids(9)
    before = generate(base, None, [ids], 16)
    make_icae(base, stirred=0.5)
    assert generate(base, None, [ids], 16) == before
