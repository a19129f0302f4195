import pytest
import torch
from tiny import assert_same_slots, base_logits, make_icae, prefix_cache, random_ids, save_base

from icae.base import load_base
from icae.errors import ICAEError
from icae.objectives import padded
from icae.segments import positions, slot_count


def encode(model, *rows, ratio=None):
    with torch.no_grad():
        return model.encoder(padded(list(rows)), [len(r) for r in rows], ratio).rows(model.origin)


def hidden_states(model, row):
    """Everything the encoder's LLM computes for a segment: (context and memory tokens, hidden)."""
    seen = []
    body = model.encoder.peft.get_base_model().get_decoder()
    hook = body.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state[0]))
    try:
        encode(model, row)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("memory", ["pooled", "shared", "learned"])
def test_lora_at_its_start_leaves_the_context_as_the_base_reads_it(base, kind, layout, memory):
    model = make_icae(base, kind=kind, layout=layout, memory=memory)
    (row,) = random_ids(11)
    first = positions(layout, 11, 4).context[0]
    logits = base.model.lm_head(hidden_states(model, row)[:11])
    torch.testing.assert_close(logits, base_logits(base, row, first), atol=1e-5, rtol=0)


def test_lora_off_its_start_does_not(base):
    (row,) = random_ids(11)
    logits = base.model.lm_head(hidden_states(make_icae(base, stirred=0.1), row)[:11])
    assert (logits - base_logits(base, row, 1)).abs().max() > 0.1


def test_embedding_slots_are_the_last_hidden_states_at_the_memory_positions(base, layout):
    model = make_icae(base, kind="embedding", layout=layout, stirred=0.1)
    (row,) = random_ids(11)
    (slots,) = encode(model, row)
    assert torch.equal(slots.tensors["embeddings"], hidden_states(model, row)[11:])


def test_untrained_mixed_memory_tokens_are_the_pooled_ones(base, kind):
    (row,) = random_ids(12)
    (pooled,), (mixed,) = (encode(make_icae(base, kind=kind, memory=m), row) for m in ("pooled", "mixed"))
    assert_same_slots(mixed, pooled, 1e-5)


def test_each_place_in_a_block_is_mixed_by_its_own_map(base):
    model = make_icae(base, kind="embedding", memory="mixed", readout="memory", stirred=0.1)
    (row,) = random_ids(6)
    (slots,) = encode(model, row)
    blocks, maps = base.embed(torch.tensor(row)), model.encoder.mix.detach()
    size = base.model.get_input_embeddings().weight.pow(2).mean().sqrt()
    second = sum(blocks[4 + j] @ maps[j] for j in range(2)) * size + model.encoder.memory[0]
    torch.testing.assert_close(slots.tensors["embeddings"][1], second.detach(), atol=1e-5, rtol=1e-4)
    (slots,) = encode(model, row, ratio=5)  # five tokens share four maps, each a little weaker
    first = sum(blocks[j] @ maps[(0, 0, 1, 2, 3)[j]] for j in range(5)) * size * 0.8**0.5 + model.encoder.memory[0]
    torch.testing.assert_close(slots.tensors["embeddings"][0], first.detach(), atol=1e-5, rtol=1e-4)


def test_the_memory_readout_needs_no_pass_and_the_residual_one_starts_from_it(base):
    settings = {"kind": "embedding", "memory": "mixed", "slot_norm": 50.0}
    (row,) = random_ids(11)
    first = make_icae(base, readout="memory", **settings)
    first.encoder.peft.get_base_model().get_decoder().forward = None  # it would fail if it were called
    (bare,), (start,) = encode(first, row), encode(make_icae(base, readout="residual", **settings), row)
    assert_same_slots(start, bare, 1e-4)
    rms = bare.tensors["embeddings"].pow(2).mean(-1).sqrt() / base.model.get_input_embeddings().weight.pow(2).mean().sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 50.0), atol=0, rtol=1e-3)
    (moved,) = encode(make_icae(base, readout="residual", stirred=0.1, **settings), row)
    assert (moved.tensors["embeddings"] - bare.tensors["embeddings"]).abs().max() > 0.1


def test_kv_slots_refuse_the_settings_of_embedding_slots(base):
    for settings in ({"readout": "memory"}, {"slot_norm": 2.0}):
        with pytest.raises(ICAEError, match="are for embedding slots"):
            make_icae(base, kind="kv", **settings)


def test_untrained_pooled_slots_at_ratio_one_are_the_prefix_cache_of_the_first_layer(base):
    """A memory token is then its context token's own embedding at its own position; later layers differ, since it also sees the
    context after it."""
    (row,) = random_ids(9)
    (slots,) = encode(make_icae(base, layout="spread"), row, ratio=1)
    cache = prefix_cache(base, row, first=1)
    assert slots.positions.tolist() == list(range(1, 10))
    for name in ("keys", "values"):
        torch.testing.assert_close(slots.tensors[name][:, 0], cache[name][:, 0], atol=1e-5, rtol=0)
        assert (slots.tensors[name][:, 1] - cache[name][:, 1]).abs().max() > 1e-2


def test_the_llm_gets_the_positions_of_the_layout(base, kind, layout):
    model, seen = make_icae(base, kind=kind, layout=layout), []
    body = model.encoder.peft.get_base_model().get_decoder()
    hook = body.register_forward_pre_hook(lambda _, __, given: seen.append(given["position_ids"].tolist()), with_kwargs=True)
    slots = encode(model, *random_ids(9, 6))
    hook.remove()
    long, short = (positions(layout, n, 4) for n in (9, 6))
    assert seen == [[long.context + long.memory, [*short.context, 0, 0, 0, *short.memory, 0]]]
    assert [s.positions.tolist() for s in slots] == [long.slots, short.slots]


def test_slots_do_not_depend_on_their_neighbours(base, kind, layout):
    model = make_icae(base, kind=kind, layout=layout, stirred=0.1)
    rows = random_ids(5, 16, 9, 2)
    for alone, together in zip([encode(model, r)[0] for r in rows], encode(model, *rows), strict=True):
        assert_same_slots(together, alone, 1e-5)


def test_padding_is_never_read(base, kind):
    model = make_icae(base, kind=kind, stirred=0.1)
    ids = padded(random_ids(5, 16))
    other = ids.clone()
    other[0, 5:] = 77
    with torch.no_grad():
        for a, b in zip(*(model.encoder(i, [5, 16]).rows(model.origin) for i in (ids, other)), strict=True):
            assert_same_slots(a, b, 0)


def test_every_context_token_reaches_every_slot(base, kind, layout):
    model = make_icae(base, kind=kind, layout=layout, stirred=0.1)
    (row,) = random_ids(12)
    (slots,) = encode(model, row)
    name = "keys" if kind == "kv" else "embeddings"
    for place in range(12):
        changed = [*row[:place], row[place] + 1, *row[place + 1 :]]
        moved = (encode(model, changed)[0].tensors[name] - slots.tensors[name]).flatten(1).abs().amax(1)
        assert (moved > 1e-4).all(), place


@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 16, 40])
def test_the_ratio_of_the_call_decides_how_many_slots(base, kind, ratio):
    for row, slots in zip(rows := random_ids(5, 16, 9), encode(make_icae(base, kind=kind), *rows, ratio=ratio), strict=True):
        assert slots.count == slot_count(len(row), ratio)


def test_pooled_memory_is_the_block_mean_scaled_by_the_root_of_its_size(base):
    model = make_icae(base, memory="pooled")
    context = base.embed(padded(random_ids(6, 8)))
    real = torch.tensor([[True] * 6 + [False] * 2, [True] * 8])
    memory = model.encoder.memory_tokens(context, real, 2, 4)
    by_hand = [[context[0, :4].sum(0) / 2, context[0, 4:6].sum(0) / 2**0.5], [context[1, :4].sum(0) / 2, context[1, 4:].sum(0) / 2]]
    torch.testing.assert_close(memory, torch.stack([torch.stack(row) for row in by_hand]), atol=1e-6, rtol=0)


def test_shared_memory_is_one_vector_and_learned_memory_one_for_each_slot(base):
    context, real = torch.zeros(1, 16, 32), torch.ones(1, 16, dtype=torch.bool)
    shared, learned = (make_icae(base, memory=m).encoder for m in ("shared", "learned"))
    assert shared.memory.shape == (1, 32)
    assert torch.equal(shared.memory_tokens(context, real, 4, 4)[0], shared.memory.expand(4, -1))
    assert learned.memory.shape == (4, 32)
    assert torch.equal(learned.memory_tokens(context, real, 3, 4)[0], learned.memory[:3])


def test_more_slots_than_learned_memory_tokens_are_refused(base):
    with pytest.raises(ICAEError, match="8 slots needed, but this adapter learned 4 memory tokens; use a higher ratio"):
        encode(make_icae(base, memory="learned"), *random_ids(16), ratio=2)


def test_lora_targets_that_the_base_does_not_have_are_named(base):
    with pytest.raises(ICAEError, match="c_attn"):
        make_icae(base, lora_targets=["c_attn"])


def test_a_segment_longer_than_a_sliding_window_keeps_all_its_keys(tmp_path, layout):
    base = load_base(str(save_base(tmp_path / "gemma", "gemma3_text", sliding_window=6)))
    (row,) = random_ids(16)
    (slots,) = encode(make_icae(base, layout=layout), row, ratio=1)
    own = prefix_cache(base, row, first=positions(layout, 16, 1).slots[0])
    torch.testing.assert_close(slots.tensors["keys"][:, 0], own["keys"][:, 0], atol=1e-5, rtol=0)
