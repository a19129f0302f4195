import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny import LINES, assert_same_slots, base_logits, make_icae, one_line, random_ids

from icae.chat import chat_prompt
from icae.errors import ICAEError
from icae.objectives import Example, Marker, autoencoding, collate, continuation, instruction
from icae.reader import GREEDY, Sampling
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots

TEXT = " ".join(LINES)


def compress(model, *lengths, **options):
    return model.compress_ids(random_ids(*lengths), **options)


def some_batch(segment_length=16):
    context, following, prompt = random_ids(20, 8, 5)
    return collate(
        [
            autoencoding(context, segment_length, 1),
            continuation(context[:9], following, segment_length, 2),
            instruction(context[3:], prompt, [*following, 1], segment_length),
        ]
    )


# ---- what is frozen, what is trained ----


def test_the_trainable_set_is_exactly_lora_memory_token_and_markers(base, kind):
    model = make_icae(base, kind=kind, lora_targets=["q_proj", "v_proj"])
    layer = "encoder.peft.base_model.model.model.layers.{}.self_attn.{}.lora_{}.default.weight"
    lora = {layer.format(i, target, side) for i in range(2) for target in ("q_proj", "v_proj") for side in "AB"}
    assert set(model.adapter_tensors()) == lora | {"encoder.memory", "markers"}
    assert model.markers.shape == (3, 2, 32)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_encoder_and_decoder_share_every_tensor_of_the_base(base):
    model = make_icae(base)
    mine = {p.data_ptr() for p in base.model.parameters()} | {b.data_ptr() for b in base.model.buffers()}
    frozen = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if name not in model.adapter_tensors()}
    assert len(frozen) >= len(list(base.model.parameters()))
    assert {t.data_ptr() for t in frozen.values()} == mine
    assert model.decoder.base.model is base.model


def test_the_decoders_modules_hold_no_adapter(base):
    make_icae(base)
    assert not any("lora" in name for name, _ in base.model.named_modules())


def test_training_leaves_every_bit_of_the_base(base, kind):
    before = {name: t.clone() for name, t in base.model.state_dict().items()}
    model = make_icae(base, kind=kind)
    adapter = {name: t.detach().clone() for name, t in model.adapter_tensors().items()}
    optimizer = torch.optim.AdamW(model.adapter_tensors().values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**some_batch())["loss"].backward()
        optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in base.model.state_dict().items())
    unread = {"kv": ("layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj"), "embedding": ()}[kind]  # after the last keys and values
    moved = {name for name, t in model.adapter_tensors().items() if not torch.equal(t, adapter[name])}
    assert moved == {name for name in adapter if not any(u in name for u in unread)}


def test_the_markers_start_as_bos_even_where_its_id_is_zero_and_the_vocabularys_mean(base):
    assert base.tokenizer.bos_token_id == 0
    sink, asks = make_icae(base).markers.unbind(1)
    assert torch.equal(sink, base.embed(torch.tensor([0, 0, 0])))
    torch.testing.assert_close(asks, base.model.get_input_embeddings().weight.mean(0).expand(3, -1))


def test_the_markers_start_as_eos_where_there_is_no_bos(base):
    without = dataclasses.replace(base, tokenizer=SimpleNamespace(bos_token_id=None, eos_token_id=1))
    assert torch.equal(make_icae(without, marker_length=1).markers[:, 0], base.embed(torch.tensor([1, 1, 1])))


@pytest.mark.parametrize("length", [1, 2])
def test_a_marker_stands_where_the_layout_puts_it(base, layout, length):
    model = make_icae(base, layout=layout, marker_length=length)
    slots = model.encoder(torch.tensor(random_ids(20)), [20], 4)
    after = [5, 6, 7, 8, 9] if layout == "appended" else [20, 21, 22, 23, 24]
    for marker in (Marker.LM, Marker.FT):
        assert model.reader.places(slots, [marker], 5).tolist() == [after]
    before = after if layout == "appended" else {1: [0, 1, 2, 3, 4], 2: [0, 0, 1, 2, 3]}[length]  # the text itself begins at 1
    assert model.reader.places(slots, [Marker.AE], 5).tolist() == [before]


# ---- scores ----


def test_what_the_base_has_no_positions_for_is_not_scored(base):
    model, most = make_icae(base), base.max_positions
    slots = model.compress_ids([[5] * 40])[0]
    room = most - slots.span - model.config.marker_length + 1  # the last token is not read
    for given, marked, fits in ((None, False, most + 1), ([slots], True, room)):
        target = [7] * (fits - 1)
        assert len(model.score(given, [Example([], Marker.LM, [5], target)], marked=marked)[0].nll) == len(target)
        with pytest.raises(ICAEError, match=f"{most}; shorten"):
            model.score(given, [Example([], Marker.LM, [5], [*target, 7])], marked=marked)


def test_what_follows_nothing_is_not_scored(base):
    with pytest.raises(ICAEError, match="follows nothing; give a prompt"):
        make_icae(base).score(None, [Example([], Marker.LM, [], [5, 6])], marked=False)


def test_rows_have_room_each_by_itself(base):
    """A long prompt with a short answer beside a short prompt with a long one."""
    reader, most = make_icae(base).reader, base.max_positions
    prompts = [[5] * (most - 5), [6] * 10]
    made = reader.collect(None, prompts, None, [5, 40])
    assert [made[0], made[1]] == [reader.collect(None, [p], None, [n])[0] for p, n in zip(prompts, (5, 40), strict=True)]
    with pytest.raises(ICAEError, match=f"take {most - 5} positions and the response 6 more"):
        reader.collect(None, prompts, None, [6, 40])


def test_nothing_asked_is_nothing_answered_and_nothing_given_is_refused(base):
    model = make_icae(base)
    assert model.answers([], []) == [] == model.compress_ids([])
    with pytest.raises(ICAEError, match="nothing to go on from"):
        list(model.stream_continuation(None))
    with pytest.raises(ICAEError, match="batch_size must be at least 1, got 0"):
        model.compress_ids([[5] * 9], batch_size=0)
    with pytest.raises(ICAEError, match="ratio must be at least 1, got 0"):
        model.compress_segments([[5] * 9], ratio=0)


# ---- the loss ----


def test_the_loss_is_the_mean_over_samples_of_the_mean_over_their_scored_tokens(base, kind, layout):
    model = make_icae(base, kind=kind, layout=layout, stirred=0.1)
    context, following, prompt = random_ids(20, 8, 5)
    examples = [autoencoding(context, 16, 1, ratio=4), continuation(context[:9], following, 16, 2)]
    examples.append(instruction(context, prompt, following, 16, ratio=4))
    alone = [float(model(**collate([e]))["loss"]) for e in examples]
    assert float(model(**collate(examples))["loss"]) == pytest.approx(sum(alone) / 3, abs=1e-5)
    scores = model.score(model.compress_ids([context, context[:9], context]), examples)
    assert [float(s.nll.mean()) for s in scores] == pytest.approx(alone, abs=1e-5)
    assert [len(s.nll) for s in scores] == [21, 6, 8]


def test_what_no_loss_reads_changes_no_loss(base):
    model = make_icae(base, stirred=0.1)
    batch = some_batch()
    loss = float(model(**batch)["loss"])
    batch["text_ids"] = torch.where(batch["real"], batch["text_ids"], 123)
    assert float(model(**batch)["loss"]) == loss


def test_scoring_without_slots_or_marker_is_the_bases_own_loss(base):
    model = make_icae(base)
    prompt, target = random_ids(7, 5)
    (score,) = model.score(None, [instruction(prompt, prompt, target, 16)], marked=False)
    with torch.no_grad():
        ids = torch.tensor([prompt + target])
        logp = base.model(input_ids=ids).logits[0, 6:11].log_softmax(-1)
    torch.testing.assert_close(score.nll, -logp[torch.arange(5), target], atol=1e-5, rtol=0)
    assert score.hits.tolist() == (logp.argmax(-1) == torch.tensor(target)).tolist()


# ---- writing slots ----


def test_compressing_together_equals_compressing_alone(base, kind, layout):
    model = make_icae(base, kind=kind, layout=layout, stirred=0.1)
    contexts = random_ids(40, 2, 16, 17)
    together = model.compress_ids(contexts, batch_size=3)
    for ids, slots in zip(contexts, together, strict=True):
        assert_same_slots(slots, model.compress_ids([ids], batch_size=8)[0], 1e-5)


def test_segments_are_compressed_each_alone_and_joined(base, kind, layout):
    model = make_icae(base, kind=kind, layout=layout, stirred=0.1)
    (ids,) = random_ids(40)
    (whole,) = model.compress_ids([ids])
    parts = model.compress_ids([ids[:12], ids[12:24], ids[24:]])
    assert [s.tokens for s in whole.segments] == [12, 12, 16]
    assert_same_slots(whole, MemorySlots.concatenate(parts), 1e-5)
    for part, back in zip(parts, whole.split(), strict=True):
        assert_same_slots(back, part, 1e-5)


def test_a_text_longer_than_the_bases_positions_is_cut_not_cut_off(base):
    (slots,) = compress(make_icae(base), 2000)
    assert base.max_positions < 2000
    assert (slots.tokens, slots.span, slots.count) == (2000, 2000, 500)


def test_compress_takes_text_and_reports_progress(base):
    model, seen = make_icae(base), []
    one = model.compress(TEXT, batch_size=2, progress=lambda *at: seen.append(at))
    segments = len(one.segments)
    assert one.tokens == len(base.encode(TEXT))
    assert seen == [(min(2 * i, segments), segments) for i in range(1, -(-segments // 2) + 1)]
    assert_same_slots(model.compress([TEXT, "A kettle."])[0], one, 1e-5)


def test_slots_say_who_made_them(base):
    model = make_icae(base)
    (slots,) = compress(model, 20, ratio=2)
    assert slots.origin == dataclasses.replace(model.origin, ratio=2)
    assert (slots.origin.base_fingerprint, slots.origin.kind, slots.origin.layout) == (base.fingerprint, "kv", "spread")
    assert not any(t.requires_grad for t in slots.tensors.values())


def test_slots_of_an_adapter_before_and_after_training_are_of_two_origins(base):
    model = make_icae(base)
    (before,) = compress(model, 20)
    assert compress(model, 20)[0].origin == before.origin
    model.train()
    optimizer = torch.optim.AdamW(model.adapter_tensors().values(), lr=0.01)
    model(**some_batch())["loss"].backward()
    optimizer.step()
    (after,) = compress(model, 20)
    with pytest.raises(ICAEError, match="different adapter"):
        MemorySlots.concatenate([before, after])


@pytest.mark.parametrize("ids", [[], [5]])
def test_a_context_of_fewer_than_two_tokens_is_refused(base, ids):
    with pytest.raises(ICAEError, match=f"at least two tokens, this one has {len(ids)}"):
        make_icae(base).compress_ids([[7, 8, 9], ids])


@pytest.mark.parametrize("ratio", [0, -3])
def test_a_ratio_below_one_is_refused(base, ratio):
    with pytest.raises(ICAEError, match=f"ratio must be at least 1, got {ratio}"):
        compress(make_icae(base), 8, ratio=ratio)


# ---- reading slots ----


def test_reading_in_a_batch_equals_reading_alone(base, kind, layout):
    model = make_icae(base, kind=kind, layout=layout, stirred=0.1)
    slots, prompts = compress(model, 40, 5, 17), ["Who?", "What did the surveyor leave behind?", "When is there no ferry?"]
    alone = [model.reconstruct_ids([s])[0] for s in slots]
    assert model.reconstruct_ids(slots, batch_size=2) == model.reconstruct_ids(slots) == alone
    assert len({tuple(a) for a in alone}) == 3
    answers = [model.answer(s, p, max_new_tokens=12) for s, p in zip(slots, prompts, strict=True)]
    assert model.answers(slots, prompts, max_new_tokens=12) == answers


def test_a_reconstruction_is_at_most_as_long_as_its_segments(base):
    model = make_icae(base, stirred=0.1)
    for slots, ids in zip(s := compress(model, 40, 5), model.reconstruct_ids(s), strict=True):
        assert len(ids) <= slots.tokens


def test_streams_say_what_the_whole_calls_say(base, kind):
    model = make_icae(base, kind=kind, stirred=0.1)
    (slots,) = compress(model, 40)
    assert "".join(model.stream_reconstruction(slots)) == model.reconstruct(slots, refine=False)
    assert model.reconstruct([slots], refine=False) == [model.reconstruct(slots, refine=False)]
    pieces = list(model.stream_continuation(slots, max_new_tokens=12))
    assert len(pieces) > 3 and "".join(pieces) == model.continue_text(slots, max_new_tokens=12)
    assert "".join(model.stream_answer(slots, "Who?", max_new_tokens=12)).strip() == model.answer(slots, "Who?", max_new_tokens=12)


def test_a_continuation_goes_on_where_the_base_takes_the_text_for_finished(base, kind, monkeypatch):
    model = make_icae(base, kind=kind, stirred=0.1)
    (slots,) = compress(model, 40)
    first = next(model.reader.ids(slots, [], Marker.LM, 1, GREEDY))
    monkeypatch.setattr(type(base), "eos_ids", [first])
    assert list(model.stream_continuation(slots, max_new_tokens=7, may_end=True)) == []
    made = list(model.reader.ids(slots, [], Marker.LM, 7, GREEDY, 7))
    assert len(made) == 7 and first not in made
    assert model.continue_text(slots, max_new_tokens=7) == base.decode(made)


def test_streamed_pieces_never_end_inside_a_character(base, monkeypatch):
    model, text = make_icae(base), "né → 🙂!"
    ids = base.encode(text)
    assert len(ids) > len(text)  # some characters are several tokens
    monkeypatch.setattr(model.reader, "generate", lambda *_: iter([[i] for i in ids]))
    pieces = list(model.stream_continuation(compress(model, 8)[0]))
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces)


def test_without_slots_an_answer_is_the_bases_own(base):
    model = make_icae(base, stirred=0.5)
    ids = chat_prompt(base.tokenizer, "Who painted the door?")
    own = base.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=1)[0, len(ids) :]
    assert model.answer(None, "Who painted the door?", max_new_tokens=20) == base.decode(own).strip() != ""
    assert model.answer_text(TEXT, "Who?", max_new_tokens=9) == model.answer(None, f"{TEXT}\n\nWho?", max_new_tokens=9)


def test_slots_change_what_is_answered(base, kind):
    model = make_icae(base, kind=kind, stirred=0.1)
    a, b = compress(model, 20, 21)
    answers = {model.answer(s, "Who?", max_new_tokens=12) for s in (a, b, None)}
    assert len(answers) == 3


def test_sampling_follows_its_seed(base):
    model = make_icae(base)
    (slots,) = compress(model, 20)
    draw = lambda seed: model.continue_text(slots, max_new_tokens=12, sampling=Sampling(1.0, 1.0, seed))  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_slots_of_another_base_are_refused_with_both_names(base, other_base):
    (slots,) = compress(make_icae(other_base), 20)
    model = make_icae(base)
    for read in (model.reconstruct, model.continue_text, lambda s: model.answer(s, "Who?"), lambda s: list(model.stream_reconstruction(s))):
        with pytest.raises(ICAEError) as error:
            read(slots)
        one_line(error.value, base.name, other_base.name, base.fingerprint[:12], other_base.fingerprint[:12])


@pytest.mark.parametrize(("field", "mine", "theirs"), [("kind", "kv", "embedding"), ("layout", "spread", "appended")])
def test_slots_of_another_kind_or_layout_are_refused(base, field, mine, theirs):
    (slots,) = compress(make_icae(base, **{field: theirs}), 20)
    with pytest.raises(ICAEError) as error:
        make_icae(base, **{field: mine}).reconstruct(slots)
    one_line(error.value, field, mine, theirs)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_generated(base):
    model = make_icae(base)
    (slots,) = compress(model, 400)
    with pytest.raises(ICAEError) as error:
        next(model.stream_answer(slots, TEXT * 2, max_new_tokens=50))
    one_line(error.value, "512", "shorten the prompt")
    with pytest.raises(ICAEError, match="600 more"):
        model.continue_text(slots, max_new_tokens=600)


def test_a_loaded_slot_file_answers_as_the_slots_did(base, kind, layout, tmp_path):
    model = make_icae(base, kind=kind, layout=layout, stirred=0.1)
    (slots,) = compress(model, 40)
    slots.save(tmp_path / "a.safetensors")
    back = MemorySlots.load(tmp_path / "a.safetensors")
    assert_same_slots(back, slots, 0)
    assert model.answer(back, "Who?", max_new_tokens=12) == model.answer(slots, "Who?", max_new_tokens=12)
    assert model.reconstruct(back) == model.reconstruct(slots)


@pytest.mark.real
def test_the_embedded_base_reads_its_own_prefix_as_slots(real_base):
    """LoRA at its start on the real model, first layer: memory tokens at ratio 1 are the context's own tokens."""
    from tiny import prefix_cache

    model = make_icae(real_base, segment_length=64)
    ids = real_base.encode(LINES[0])
    (slots,) = model.compress_ids([ids], ratio=1)
    own = prefix_cache(real_base, ids, first=1)
    torch.testing.assert_close(slots.tensors["keys"][:, 0], own["keys"][:, 0], atol=1e-4, rtol=0)


def taught(base, target, prompt, distil=1.0):
    """An instruction example whose teacher reads another prompt before the same target."""
    context, own = random_ids(14, 4, seed=8)
    return dataclasses.replace(instruction(context, own, target, 16), teacher=prompt, distil=distil)


def test_distillation_is_the_divergence_from_the_base_with_the_full_text(base, kind):
    """KL by hand, row by row, from the base's own logits over the teacher's text."""
    model = make_icae(base, kind=kind, stirred=0.05)
    targets, prompts = random_ids(3, 6, seed=4), random_ids(9, 5, seed=5)
    examples = [taught(base, t, p) for t, p in zip(targets, prompts, strict=True)]
    by_hand = []
    for e in examples:
        said = base_logits(base, e.teacher + e.target)[len(e.teacher) - 1 : -1].log_softmax(-1)
        slots = model.compress_ids([e.segments[0]])
        logits, *_ = model.reader.read(SlotBatch.pad(slots), *(collate([e])[name] for name in ("markers", "text_ids", "real", "scored")))
        mine = logits[0].log_softmax(-1)
        by_hand.append(float((said.exp() * (said - mine)).sum(-1).mean()))
    plain = autoencoding(*random_ids(7), 16, 1)
    with torch.no_grad():
        less = ([dataclasses.replace(e, distil=share) for e in examples] for share in (0.0, 0.25))
        got, tokens, mixed = (float(model(**collate(rows))["loss"]) for rows in (examples, *less))
        alone, beside = (float(model(**collate(rows))["loss"]) for rows in ([plain], [examples[0], plain]))
    assert min(by_hand) > 0.01
    assert got == pytest.approx(sum(by_hand) / 2, rel=1e-3)
    assert mixed == pytest.approx(0.75 * tokens + 0.25 * got, rel=1e-4)
    assert beside == pytest.approx((by_hand[0] + alone) / 2, rel=1e-3)


@torch.no_grad()
def test_a_heavy_first_token_counts_as_several(base, kind):
    model, example = make_icae(base, kind=kind, stirred=0.05), autoencoding(*random_ids(7), 16, 1)
    (score,) = model.score(model.compress_ids(example.segments), [example])
    heavy = float(model(**collate([dataclasses.replace(example, first=4.0)]))["loss"])
    assert heavy == pytest.approx(float(score.nll.sum() + 3 * score.nll[0]) / 11, rel=1e-4)


def test_states_are_compared_with_those_of_who_reads_the_full_text(base, kind):
    """By hand: relative squared distance, layer by layer, on the tokens that stand at the end of both texts."""
    model = make_icae(base, kind=kind, stirred=0.05)
    (target,), (prompt,) = random_ids(5, seed=4), random_ids(9, seed=5)
    example = taught(base, target, prompt)
    example = dataclasses.replace(example, prompt=[*example.prompt, 7, 9], teacher=[*example.teacher, 7, 9], align=3.0)
    assert example.prompt[-3] != example.teacher[-3]
    states, read = [], [example.teacher, example.prompt]
    with torch.no_grad():
        states.append(base.model(input_ids=torch.tensor([read[0] + target]), output_hidden_states=True).hidden_states[1:])
        batch = collate([example])
        slots = SlotBatch.pad(model.compress_ids(example.segments))
        places = (batch[name] for name in ("markers", "text_ids", "real", "scored"))
        states.append(model.reader.read(slots, *places, states=True).states)
        own = [[layer[0, len(ids) - 2 : len(ids) + len(target) - 1] for layer in made] for ids, made in zip(read, states, strict=True)]
        away = [((mine - theirs) ** 2).sum(-1) / (theirs**2).sum(-1) for theirs, mine in zip(*own, strict=True)]
        apart, together = (float(model(**collate([dataclasses.replace(example, align=a)]))["loss"]) for a in (3.0, 0.0))
    assert len(own[0][0]) == 2 + 4 and len(away) == base.model.config.num_hidden_layers
    assert apart - together == pytest.approx(3 * float(torch.stack(away).mean()), rel=1e-3)


def test_a_tuned_base_teaches_what_is_meant_for_it_where_one_is_given(base):
    """A tutor that reads as the base does changes nothing; another one changes what is learned from its own samples, and nothing else."""
    from icae.decoder import Decoder
    from icae.reader import Reader

    model = make_icae(base, stirred=0.05)
    response = dataclasses.replace(taught(base, *random_ids(4, 9)), align=1.0, by_tutor=True)
    going_on = dataclasses.replace(response, by_tutor=False)
    other = copy.deepcopy(base.model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)

    def losses(tuned=None):
        model.tutor = None if tuned is None else Reader(Decoder(dataclasses.replace(base, model=tuned)), model.config, model.markers)
        with torch.no_grad():
            return [float(model(**collate(rows))["loss"]) for rows in ([response], [going_on], [response, going_on])]

    alone, same, others = losses(), losses(base.model), losses(other)
    assert same == pytest.approx(alone, rel=1e-5)
    assert abs(others[0] - alone[0]) > 1e-3 and others[1] == alone[1]
    assert others[2] == pytest.approx((others[0] + others[1]) / 2, rel=1e-4)


def test_distillation_teaches_the_encoder_and_leaves_no_trace_in_the_base(base, kind):
    model = make_icae(base, kind=kind, stirred=0.05).train()
    model(**collate([taught(base, *random_ids(4, 9))]))["loss"].backward()
    assert model.encoder.memory.grad.any()
    assert all(p.grad is None for p in base.model.parameters())
