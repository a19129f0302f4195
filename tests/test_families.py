import torch
from tiny import LINES, assert_same_slots, make_icae, prefix_as_slots, prefix_cache, random_ids

from icae.decoder import Decoder
from icae.objectives import autoencoding, collate, continuation
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots


def test_compress_read_back_and_train(family_base, kind, layout):
    """One pass through everything: slots have their shape, batches equal single rows, and every part that a loss reads gets a
    gradient while the base gets none."""
    model = make_icae(family_base, kind=kind, layout=layout, stirred=0.05)
    contexts = random_ids(30, 7, 16)
    slots = model.compress_ids(contexts)
    assert [s.count for s in slots] == [8, 2, 4]
    for ids, together in zip(contexts, slots, strict=True):
        assert_same_slots(together, model.compress_ids([ids])[0], 1e-5)
    assert model.reconstruct_ids(slots) == [model.reconstruct_ids([s])[0] for s in slots]
    assert isinstance(model.continue_text(slots[0], max_new_tokens=3), str)
    model.train()
    model(**collate([autoencoding(contexts[0], 16, 1), continuation(contexts[1], contexts[2], 16)]))["loss"].backward()
    without = {name for name, p in model.adapter_tensors().items() if p.grad is None or not p.grad.any()}
    assert without == {n for n in model.adapter_tensors() if kind == "kv" and "layers.1" in n and ("q_proj" in n or "o_proj" in n)}
    assert all(p.grad is None for p in family_base.model.parameters())


def test_the_decoder_without_slots_is_the_base(family_base):
    (ids,) = random_ids(9)
    own = family_base.model.generate(torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=1)
    places, real = torch.arange(9)[None], torch.ones(1, 9, dtype=torch.bool)
    made = [step[0] for step in Decoder(family_base).generate(None, family_base.embed(torch.tensor([ids])), places, real, [12], stop=[])]
    assert made == own[0, 9:].tolist()


def test_joining_segments_shifts_their_keys_in_every_layer(family_base):
    """Each family turns its keys by its own angles, Gemma 3 by two sets of them."""
    a, b = random_ids(6, 9)
    joined = MemorySlots.concatenate([prefix_as_slots(family_base, a), prefix_as_slots(family_base, b)])
    further_on = prefix_cache(family_base, b, first=6)
    for name in ("keys", "values"):
        torch.testing.assert_close(joined.tensors[name][6:], further_on[name], atol=1e-4, rtol=0)


def test_the_text_as_slots_reads_like_the_text(family_base):
    context, prompt = random_ids(10, 5)
    slots = SlotBatch.pad([prefix_as_slots(family_base, context)])
    places, real = torch.arange(10, 15)[None], torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        read = Decoder(family_base).read(slots, family_base.embed(torch.tensor([prompt])), places, real)[0][0]
        whole = family_base.model(input_ids=torch.tensor([context + prompt])).logits[0, 10:]
    torch.testing.assert_close(read, whole, atol=1e-4, rtol=0)


def test_a_file_of_slots_comes_back_and_is_read_alike(family_base, kind, tmp_path):
    model = make_icae(family_base, kind=kind, stirred=0.05)
    slots = model.compress(" ".join(LINES[:2]))
    slots.save(tmp_path / "a.safetensors")
    back = MemorySlots.load(tmp_path / "a.safetensors")
    assert_same_slots(back, slots, 0)
    assert model.answer(back, "Who?", max_new_tokens=6) == model.answer(slots, "Who?", max_new_tokens=6)
