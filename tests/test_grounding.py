import dataclasses

import pytest
import torch
from tiny import LINES, make_icae, one_line, random_slots

from icae.chat import chat_prompt
from icae.errors import ICAEError
from icae.grounding import ELSEWHERE, MIDWORD, UNKNOWN, Vocabulary, Words
from icae.objectives import Marker
from icae.slots import MemorySlots

WORDS = ["!", "a", "lamp", "door", "green", "!lamp", "!door", "!green", "1", "9", "3", ".", "<end>", "\u4e00", "!no"]
"""A vocabulary of words and digits; "!" is a space before them."""
ID = {word: i for i, word in enumerate(WORDS)}


class Tokenizer:
    """As much of one as a vocabulary is read from."""

    def __len__(self):
        return len(WORDS)

    def convert_ids_to_tokens(self, ids):
        return [WORDS[i].replace("!", "\u0120") for i in ids]


@pytest.fixture
def vocabulary():
    return Vocabulary.of(Tokenizer(), len(WORDS) + 2, [ID["<end>"]])


def words(vocabulary, *context):
    return Words(
        [ID[w] for w in context], vocabulary, lambda ids: [ID[w] for w in ("".join(WORDS[i] for i in ids).lstrip("!"),) if w in ID] or ids
    )


def lost(guide, *names):
    """What each token loses next."""
    scores = -guide.scores(torch.zeros(len(WORDS) + 2))
    return [float(scores[ID[name]]) for name in names]


def test_a_vocabulary_knows_where_words_go_on(vocabulary):
    inner = [WORDS[i] for i in vocabulary.inner.nonzero()[:, 0].tolist()]
    assert inner == ["a", "lamp", "door", "green", "1", "9", "3"]  # other scripts have no spaces between words
    assert [WORDS[i] for i in vocabulary.marks[: len(WORDS)].nonzero()[:, 0].tolist()] == ["!", "."]
    assert vocabulary.inner.shape == (len(WORDS) + 2,)  # the base may have more rows than the tokenizer has tokens


def test_an_answer_begins_with_any_word_and_those_of_the_context_go_on_from_there(vocabulary):
    for first, then in (("lamp", "!green"), ("green", "."), ("a", "!lamp")):
        guide = words(vocabulary, "a", "!lamp", "!green", ".").guide()
        assert lost(guide, *WORDS) == [0] * len(WORDS)  # "Yes" is seldom a word of the text
        guide.advance(ID[first])  # spelled without the space before it
        assert lost(guide, then, "<end>") == [0, 0] and lost(guide, "door") == [MIDWORD]
    guide = words(vocabulary, "a", "!lamp").guide()
    guide.advance(ID["door"])
    assert lost(guide, "!lamp", "!no", "<end>") == [ELSEWHERE, UNKNOWN, 0]  # after a word of its own, anywhere


def test_words_go_on_as_in_the_context_and_others_cost_by_how_strange_they_are(vocabulary):
    guide = words(vocabulary, "a", "!lamp", "!green", "!door", ".").guide()
    guide.advance(ID["lamp"])
    assert lost(guide, "!green", "<end>") == [0, 0]
    assert lost(guide, "!door", "!no", "door", ".") == [ELSEWHERE, UNKNOWN, MIDWORD, ELSEWHERE]
    guide.advance(ID["!door"])  # it jumps, and may go on from there
    assert lost(guide, ".", "!green") == [0, ELSEWHERE]


def test_digits_follow_the_longest_match(vocabulary):
    guide = words(vocabulary, "!no", "1", "9", "1", "3", "!lamp", "1", "3").guide()
    for digit in "191":
        guide.advance(ID[digit])
    assert lost(guide, "3") == [0] and lost(guide, "9", "1") == [MIDWORD, MIDWORD]


def test_strength_is_a_factor(vocabulary):
    context = words(vocabulary, "a", "!lamp")
    for strength in (0.5, 3):
        guide = context.guide(strength)
        guide.advance(ID["a"])
        assert lost(guide, "!no", "door") == [strength * UNKNOWN, strength * MIDWORD]


def test_ids_go_with_their_slots(tmp_path):
    slots = dataclasses.replace(random_slots(segments=((8, 2, 8), (5, 2, 5))), ids=torch.arange(13, dtype=torch.int32))
    first, second = slots.split()
    assert first.ids.tolist() == list(range(8)) and second.ids.tolist() == list(range(8, 13))
    assert MemorySlots.concatenate([second, first]).ids.tolist() == [*range(8, 13), *range(8)]
    assert MemorySlots.concatenate([first, dataclasses.replace(second, ids=None)]).ids is None
    slots.save(tmp_path / "slots.safetensors")
    back = MemorySlots.load(tmp_path / "slots.safetensors")
    assert torch.equal(back.ids, slots.ids) and back.ids.dtype == torch.int32 and "token_ids" not in back.tensors
    assert slots.to(torch.float16).ids is slots.ids and slots.nbytes == random_slots(segments=((8, 2, 8), (5, 2, 5))).nbytes


def test_answers_are_made_of_the_context_s_words_where_that_is_asked_for_strongly(base, kind):
    model = make_icae(base, kind=kind, stirred=0.05)
    slots, prompts = model.compress(LINES), ["Who?", "What is in the window?", "And when?", "Why?"]
    free = model.answers(slots, prompts, max_new_tokens=8)
    model.config = model.config.replace(grounding=1000)
    made = model.answers(slots, prompts, max_new_tokens=8)
    assert made != free
    guides = [model.guide(model.words(s.ids)) for s in slots]
    rows = model.reader.collect(slots, [chat_prompt(base.tokenizer, p) for p in prompts], Marker.FT, [8] * 4, guides=guides)
    assert [base.decode(row).strip() for row in rows] == made
    for row, s in zip(rows, slots, strict=True):
        guide = model.guide(model.words(s.ids))
        for at, id in enumerate(row):
            open_ids = (guide.scores(torch.zeros(320)) == 0).nonzero()[:, 0].tolist()
            assert id in open_ids and (at == 0 or len(open_ids) < 320)
            guide.advance(id)
    assert made == [model.answer(s, p, max_new_tokens=8) for s, p in zip(slots, prompts, strict=True)]
    without = [dataclasses.replace(s, ids=None) for s in slots]
    assert model.answers(without, prompts, max_new_tokens=8) == free
    assert model.answer(None, "Who?", max_new_tokens=8) == base.decode(
        model.reader.collect(None, [chat_prompt(base.tokenizer, "Who?")], None, [8])[0]
    )
    plain = model.reader.collect(slots[:1], [chat_prompt(base.tokenizer, "Who?")], Marker.FT, [8])[0]
    assert base.decode(plain).strip() == free[0]  # the reader itself adds nothing


def test_a_bad_strength_is_refused(base):
    with pytest.raises(ICAEError) as error:
        make_icae(base, grounding=-1)
    one_line(error.value, "grounding")


def test_every_family_grounds_and_focuses(family_base):
    model = make_icae(family_base, stirred=0.05, grounding=1, focus=1)
    slots = model.compress(" ".join(LINES))
    assert len(slots.segments) > 1 and len(model.focused(slots, "Who?").segments) == 1
    assert model.answer(slots, "Who?", max_new_tokens=5) == model.answers([slots], ["Who?"], max_new_tokens=5)[0]
